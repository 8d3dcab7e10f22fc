"""Continued pretraining on long documents with transformers.Trainer; each packed row is shared by cp_size ranks.

    accelerate launch --config_file configs/accelerate/cpu2.yaml recipes/pretrain.py configs/pretrain_quickstart.yaml

`sap_hf.pack` groups whole documents into rows, `sap_hf.DataCollatorForPacking` keeps their borders, and one line
shares each row: `sap_hf.attach(trainer, ...)`.
"""

from __future__ import annotations

import sys
import time

from datasets import Dataset
from material import load_documents, load_model, load_tokenizer
from report import check_documents, check_saved, hush, print_savings, print_summary
from settings import load
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

import sap_hf


def main(arguments: list[str]) -> None:
    """Train as the YAML says."""
    started = time.time()
    settings = load(arguments)
    length, too_long = settings.data.pack_length, settings.data.too_long
    args = settings.arguments(TrainingArguments, eval_on_start=True)
    hush(args)
    # The first process of a machine makes material ready; the others find it.
    with args.main_process_first(desc="material"):
        tokenizer = load_tokenizer(settings.model)
        texts, held_out = load_documents(settings.data)

    trainer = Trainer(
        model=load_model(settings.model),
        args=args,
        train_dataset=sap_hf.pack(tokenize(texts, tokenizer), length, too_long=too_long),
        eval_dataset=sap_hf.pack(tokenize(held_out, tokenizer), length, too_long=too_long),
        data_collator=sap_hf.DataCollatorForPacking(),
        processing_class=tokenizer,
    )
    sap_hf.attach(trainer, settings.sap)

    print_savings(trainer, settings.sap)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    trainer.save_state()
    documents = check_documents(trainer.eval_dataset[0])
    saved = check_saved(trainer, documents, sap_hf.pack(documents, length))
    print_summary(trainer, (before, after), saved, started)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def tokenize(texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """One document per row, closed by the end-of-text token."""
    end = tokenizer.eos_token_id

    def to_ids(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # Special tokens that a document quotes are text of it: read as such, they would end it early.
        rows = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return {"input_ids": [[*row, end] for row in rows]}

    return texts.map(to_ids, batched=True, remove_columns=texts.column_names, desc="Tokenizing")


if __name__ == "__main__":
    main(sys.argv[1:])
