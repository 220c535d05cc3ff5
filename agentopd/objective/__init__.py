"""The objective: one pure block per file, each the identity at its off setting, composed by ``compose.compute_loss``.

Shape suffixes, everywhere below: B episodes of the micro-batch, T padded length, N sampled tokens flattened in row
order, K teacher top-K, V vocabulary, S skills. All log-prob arithmetic is in fp32.
"""
