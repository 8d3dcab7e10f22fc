"""Start a recipe as a user does, and small material for it: a tokenizer, a model and documents of a few tokens."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "recipes" / "smollm2_training.jinja"
SENTENCE = "rows move only where a document was cut and every rank counts the same tokens in the end"
WORDS = SENTENCE.split(" ")


def accelerate_launch(config: str, *arguments: str, timeout: float = 240) -> str:
    """Run `accelerate launch --config_file config arguments` from the repository's root; return what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *arguments]
    return finish(command, timeout)


def run_alone(*arguments: str, timeout: float = 240) -> str:
    """Run `python arguments` as one process from the repository's root; return what it printed."""
    return finish([sys.executable, *arguments], timeout)


def finish(command: list[str], timeout: float) -> str:
    """Run a command to its end; a failure or a timeout shows everything that it printed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    if sys.platform == "linux":
        # gloo looks the host name up otherwise, and in a container that may resolve to nothing.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    # A session of its own: a timeout must end the launcher's children too, and nothing else.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as late:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s: {' '.join(command)}\n{output}") from late
    assert process.returncode == 0, f"exit {process.returncode}: {' '.join(command)}\n{output}"
    return output


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 384 tokens with SmolLM2's turn marks; pad and end-of-turn are the same token, as there."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE] * 4 + ["user assistant system"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[2], pad_token=special[2]
    )


def write_tiny_model(folder: Path) -> Path:
    """Save a random two-layer llama with GQA 4/2, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE.read_text()
    tokenizer.save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int = 40) -> Path:
    """Write chats of two to eight turns, one JSON object per line."""
    chance = random.Random(0)
    with path.open("w") as out:
        for _ in range(count):
            turns = [
                {"role": ("user", "assistant")[i % 2], "content": " ".join(chance.choices(WORDS, k=6))}
                for i in range(2 * chance.randint(1, 4))
            ]
            out.write(json.dumps({"messages": turns}) + "\n")
    return path


def write_texts(path: Path, count: int = 12) -> Path:
    """Write texts of 20 to 300 words, one JSON object per line."""
    chance = random.Random(0)
    with path.open("w") as out:
        for _ in range(count):
            out.write(json.dumps({"text": " ".join(chance.choices(WORDS, k=chance.randint(20, 300)))}) + "\n")
    return path


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the log that the trainer wrote into trainer_state.json."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]
