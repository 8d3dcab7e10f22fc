"""Supervised fine-tuning on packed chats with trl.SFTTrainer; each packed row is shared by cp_size ranks.

    accelerate launch --config_file configs/accelerate/cpu2.yaml recipes/sft.py configs/sft_quickstart.yaml

One line makes it so: `sap_hf.attach(trainer, ...)`. Everything else is an ordinary SFT script: chats, best-fit
packing, the loss on assistant turns, held-out loss before and after, a model saved for plain transformers.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from datasets import Dataset
from material import load_documents, load_model, load_tokenizer
from report import check_documents, check_saved, hush, print_savings, print_summary
from settings import load
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

import sap_hf
from sap_hf.errors import ConfigError

logger = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Train as the YAML says."""
    started = time.time()
    settings = load(arguments)
    if settings.data.too_long != "drop":
        raise ConfigError(
            "data.too_long=split would cut chats in two. Use drop, or a larger data.pack_length."
        )
    length = settings.data.pack_length
    args = settings.arguments(
        SFTConfig, packing=True, packing_strategy="bfd", max_length=length, eval_on_start=True
    )
    hush(args)
    # The first process of a machine makes material ready; the others find it.
    with args.main_process_first(desc="material"):
        tokenizer = load_tokenizer(settings.model)
        chats, held_out = load_documents(settings.data)
    template = tokenizer.chat_template
    if settings.model.chat_template:
        tokenizer.chat_template = Path(settings.model.chat_template).read_text()

    trainer = SFTTrainer(
        model=load_model(settings.model),
        args=args,
        train_dataset=whole_chats(chats, tokenizer, length),
        eval_dataset=whole_chats(held_out, tokenizer, length),
        processing_class=tokenizer,
    )
    sap_hf.attach(trainer, settings.sap)

    print_savings(trainer, settings.sap)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    after = trainer.evaluate()["eval_loss"]
    # Generation marks are for training: the saved model keeps the template that every server can read.
    tokenizer.chat_template = template
    trainer.save_model()
    trainer.save_state()
    documents = check_documents(trainer.eval_dataset[0])
    saved = check_saved(trainer, documents, Dataset.from_list(documents))
    print_summary(trainer, (before, after), saved, started)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def whole_chats(chats: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Leave out chats of more than `length` tokens: packing would cut off their ends."""
    fits = [
        len(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]) <= length
        for chat in chats["messages"]
    ]
    if not all(fits):
        logger.warning(
            "%d of %d chats are longer than %d tokens and are left out.", fits.count(False), len(fits), length
        )
    return chats.select([at for at, fit in enumerate(fits) if fit])


if __name__ == "__main__":
    main(sys.argv[1:])
