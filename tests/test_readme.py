"""Every block of the README is run as a reader would."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from checkpoints import make_model, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eaptk import cli

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README takes for granted: two checkpoints of one model, with its tokenizer, and questions."""
    folder = tmp_path_factory.mktemp("readme")
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytes_.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    for seed, name in enumerate(("sft", "rl")):
        checkpoint = folder / "checkpoints" / name
        make_model(seed, vocab_size=300).save_pretrained(checkpoint)
        PreTrainedTokenizerFast(tokenizer_object=bytes_).save_pretrained(checkpoint)
    questions = [
        {"id": f"{a}+{b}", "prompt": f"{a} + {b} = ", "answer": str(a + b)} for a in range(4) for b in (5, 9)
    ]
    write_jsonl(folder / "questions.jsonl", questions)
    return folder


def test_every_block_runs_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ran = 0
    names: dict[str, object] = {}  # one session: later blocks use what earlier ones imported
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), names)
            ran += 1
            continue
        assert language == "sh", f"a block in {language!r} is not run by this test"
        for line in block.splitlines():
            command, *arguments = shlex.split(line, comments=True)
            if command == "make":
                # The gate runs `make test` itself; here it is enough that the target is there.
                subprocess.run(["make", "-n", "-C", str(ROOT), *arguments], check=True, capture_output=True)
            else:
                assert command == "eaptk"
                with pytest.raises(SystemExit) as exit_:
                    cli.main(arguments)
                assert not exit_.value.code, line
            ran += 1
    assert ran >= 10
