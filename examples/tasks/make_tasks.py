"""Makes two offline lm-eval tasks from the built-in text: cloze and multiple choice.

    python examples/tasks/make_tasks.py results/demo my_tasks
    autocompress eval results/demo --task-folder my_tasks --task cloze --task choice

Questions come from documents that neither calibration nor search nor validation saw.
`cloze`: the last word of a sentence, where the sentence before has it, too.
`choice`: which of four sentences follows one; the other three are from other documents.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

CONTEXT = 40  # words that a question shows at most
YAML = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: {kind}
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: "{target}"
{choices}target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
{more}"""
MORE = """  - metric: {}
    aggregation: {}
    higher_is_better: {}
"""


def unseen_documents(result: Path) -> list[str]:
    """The built-in topics that no decision of the search behind `result` saw."""
    from pydoc_data.topics import topics

    splits = json.loads((result / "autocompress.json").read_text())["calibration"]["splits"]
    seen = {it for name, split in splits.items() if name != "test" for it in split["documents"]}
    found = {
        hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]: text
        for text in topics.values()
    }
    return [found[digest] for digest in sorted(found.keys() - seen)]


def pairs(document: str) -> list[tuple[str, str]]:
    """Sentences of plain prose, 8 to 40 words long, and the one that follows each."""
    parts = re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(document.split()))
    prose = re.compile(r"[A-Z][\w ,;'()*“”’-]+\.")
    good = [bool(prose.fullmatch(it)) and 8 <= len(it.split()) <= CONTEXT for it in parts]
    both = zip(itertools.pairwise(parts), itertools.pairwise(good), strict=True)
    return [pair for pair, fine in both if all(fine)]


def cloze(documents: list[str]) -> Iterator[dict[str, str]]:
    """Sentences whose last word, of 4 letters or more, stands in the sentence before."""
    for before, sentence in itertools.chain.from_iterable(map(pairs, documents)):
        *words, last = sentence.rstrip(".").split()
        if len(last) >= 4 and last.isalpha() and last.lower() in before.lower().split():
            yield {"context": f"{before} {' '.join(words)}", "target": last}


def choice(documents: list[str], rng: random.Random) -> Iterator[dict[str, object]]:
    """A sentence, the one that follows it, and three from other documents."""
    pools = [pool for pool in map(pairs, documents) if pool]
    for pool in pools:
        others = [after for other in pools if other is not pool for _, after in other]
        for before, after in pool[::2]:
            choices = [after, *rng.sample(others, 3)]
            rng.shuffle(choices)
            yield {"context": before, "choices": choices, "gold": choices.index(after)}


def write(folder: Path, name: str, rows: list[dict[str, object]], **yaml: str) -> None:
    """The task's questions and its YAML file beside them."""
    data = (folder / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(YAML.format(name=name, data=data, **yaml))
    print(f"{name}: {len(rows)} questions, {data}")


def main(result: Path, folder: Path) -> None:
    """Write both tasks into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = unseen_documents(result)
    perplexity = MORE.format("perplexity", "perplexity", "false")
    write(folder, "cloze", list(cloze(documents)), kind="loglikelihood", target="{{target}}",
          choices="", more=perplexity)  # fmt: skip
    write(folder, "choice", list(choice(documents, random.Random(0))), kind="multiple_choice",
          target="{{gold}}", choices='doc_to_choice: "{{choices}}"\n',
          more=MORE.format("acc_norm", "mean", "true"))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
