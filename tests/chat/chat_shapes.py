"""Small tokenizers and the shapes of chat templates in use, so that no test depends on one model's habits."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

TEXT = (
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital. "
    "user assistant system\n\n### User:\n### Assistant:\n[INST] hello [/INST] Yes, no. 12345 3.14 think answer "
) * 4
SPECIALS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<s>", "</s>"],
    "think": ["<bos>", "<eos>", "<|User|>", "<|Assistant|>"],
}
ENDS = {  # (beginning of text, end of text)
    "chatml": (None, "<|endoftext|>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
    "gemma": ("<bos>", "<eos>"),
    "mistral": ("<s>", "</s>"),
    "think": ("<bos>", "<eos>"),
}
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'system' %}{{ m['content'] + '\n' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    # The prompt opens a thought that a finished turn no longer has; earlier turns lose theirs.
    "think": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
        "{% elif m['role'] == 'system' %}{{ m['content'] }}"
        "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
    ),
}
# Other shapes over the same tokenizers.
VARIANTS = {
    "chatml-keeps-last-thought": (
        "chatml",
        "{% for m in messages %}{% set text = m['content'] if loop.last else m['content'].split('</think>')[-1] %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "chatml-without-generation-prompt": (
        "chatml",
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}",
    ),
    "chatml-with-final-eos": (
        "chatml",
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}",
    ),
    "ordinary-text": (
        "chatml",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    ),
    "end-token-twice": (
        "mistral",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token + '\n' + eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    ),
}
ALL = [*TEMPLATES, *VARIANTS]


def byte_level(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 350 tokens with a family's special tokens; adds BOS by itself where there is one."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=SPECIALS[family],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    first, last = ENDS[family]
    if first is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[first, "$A"], special_tokens=[(first, backend.token_to_id(first))]
        )
    # pad = eos on purpose: it must never keep the end of an answer out of training
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=first, eos_token=last, pad_token=last)


def sentencepiece_like(family: str) -> PreTrainedTokenizerFast:
    """Llama 2's shape: a text is read as if a space stood before it, unknown characters fall back to bytes."""
    pieces = ["<unk>", *SPECIALS[family], *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = sorted(set(TEXT) - {" ", "\n"})
    joined = [("▁", letter) for letter in letters]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *letters, *("▁" + letter for letter in letters)])}
    backend = Tokenizer(BPE(vocabulary, joined, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    first, last = ENDS[family]
    backend.add_special_tokens(SPECIALS[family])
    backend.post_processor = processors.TemplateProcessing(
        single=[first, "$A"], special_tokens=[(first, backend.token_to_id(first))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=first, eos_token=last, unk_token="<unk>")


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one of the template shapes above, by its name; trained once. Not to be changed."""
    family, template = VARIANTS[name] if name in VARIANTS else (name, TEMPLATES[name])
    tokenizer = byte_level(family)
    tokenizer.chat_template = template
    return tokenizer
