"""Chat templates as data: how a conversation is written as text, in the Jinja form tokenizer_config.json carries."""

# of the Ziya-LLaMA-13B-v1 model card: "<human>:question\n<bot>:", turns joined by a line break
ZIYA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<human>:' + message['content'].strip() + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<bot>:' + message['content'].strip() + '\n' }}"
    "{% else %}{{ raise_exception('This model knows the roles user and assistant only.') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot>:' }}{% endif %}"
)

TEMPLATES = {"ziya": ZIYA}
