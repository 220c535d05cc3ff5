"""The learner: log-probs from hidden states without full logits, and the optimiser.

Imports nothing heavy; ``agentopd.learner.deepspeed.DeepSpeedLearner`` is the optimiser.
"""
