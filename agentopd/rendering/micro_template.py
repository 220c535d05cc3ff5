"""The chat template of the micro tokenizer: ChatML with tools as one-line signatures, to spend few tokens on them."""

MICRO_CHAT_TEMPLATE = """\
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' -%}
{%- if system or tools -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if tools -%}
{{- ('\\n' if system else '') + '<tools>' -}}
{%- for tool in tools -%}
{%- set arguments = (tool.function.parameters.properties or {}).keys() -%}
{{- '\\n' + tool.function.name + '(' + arguments | join(', ') + ')' -}}
{%- endfor -%}
{{- '\\n</tools>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if messages[0].role == 'system' else messages) -%}
{%- if message.role == 'tool' -%}
{%- set first = loop.previtem is not defined or loop.previtem.role != 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' if first else '\\n' -}}
{{- message.content -}}
{%- if loop.nextitem is not defined or loop.nextitem.role != 'tool' -%}
{{- '\\n</tool_response><|im_end|>\\n' -}}
{%- endif -%}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content -}}
{%- for call in message.tool_calls or [] -%}
{{- '\\n' if message.content or not loop.first else '' -}}
{{- '<tool_call>\\n{"name": ' + call.function.name | tojson -}}
{{- ', "arguments": ' + call.function.arguments | tojson + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
