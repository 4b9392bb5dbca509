"""One tokenizer for all families, with each one's special tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# The tokenizer's merges are learnt from this; any other text is spelt out byte by byte where needed.
TEXT = """Describe the image. What is in the picture, and what is it next to? Read the text on the sign and say which
colour it has. How many people are there in the photograph, and where do they stand? Answer the question with a word.
Compare the first image with the second one: what has changed between them? What happens at the end of the video?"""

# Two ways to write a conversation; IMAGE and VIDEO stand for a family's placeholders.
LLAVA_CHAT = """{% for message in messages %}{{ message.role.upper() }}: {% if message.content is string %}\
{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}IMAGE
{% elif part.type == 'video' %}VIDEO
{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %} {% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
CHATML_CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% elif part.type == 'text' %}{{ part.text }}\
{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make(turns: Sequence[str], named: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over :data:`TEXT`: gives any text back as it was, and knows the special tokens.

    Args:
        turns: the token that ends a turn, the one that pads, and others without a name.
        named: further ones, by the name of the tokenizer's attribute.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    eos, pad, *_ = special = list(dict.fromkeys([*turns, *named.values()]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    options = {"eos_token": eos, "pad_token": pad, "extra_special_tokens": dict(named), "padding_side": "left"}
    options |= {"model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
