"""Scored candidates a second: our evaluator, and lm-evaluation-harness with a Hugging Face model.

    pip install 'fairseq-lite[lm-eval,huggingface]' accelerate
    python -m benchmarks.few_shot.run --data-dir DATA --threads 1 --clock cpu \
        --out benchmarks/results/few-shot.json

Both have the same weights, of GPT-2's shape, and get the same prompts: questions of COPA, ARC and
HellaSwag behind no, five and 32 shots, as many as fit. First their scores are shown to be the same.
Each is a process of its own and they take turns; what is quoted is the median over rounds of the
ratio within a round. Ours is timed from samples on; the harness gets its texts ready-made, and the
better of several batch sizes counts. By default our evaluator scores the prompts' own tokens, too;
it is timed with that and without.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.few_shot import contestants, twins
from benchmarks.few_shot.contestants import Answer, Cell, Way
from benchmarks.timing import Apart, machine, ratios, record
from examples.few_shot.settings import plan

# Of each task where its questions and its shots come from, by flags of gpt3_eval.
TASKS: dict[str, dict[str, str]] = {
    "copa": {"copa_eval_set": "val", "copa_train_set": "val"},
    "arceasy": {"arceasy_eval_set": "test", "arceasy_train_set": "test"},
    "hellaswag": {"hellaswag_eval_set": "val", "hellaswag_train_set": "val"},
}


def cells_of(
    tasks: Sequence[str], shots: Sequence[int], questions: int, data: str | None
) -> list[Cell]:
    """All that is measured."""
    found = []
    for task in tasks:
        planned = plan(
            "the model", tasks=task, nb_few_shot_samples_values=list(shots), num_trials=1,
            data_dir=data, **TASKS[task],
        )  # fmt: skip
        found += [Cell(each, questions) for each in planned]
    return found


def texts_of(cells: Sequence[Cell]) -> list[str]:
    """Texts whose words the vocabulary knows."""
    found = []
    for cell in cells:
        if not cell.planned.k:
            trial = cell.trial()
            pool = trial.task.samples(cell.planned.eval_set)[:2000]
            found += [trial.template.encode_correct_candidate(each) for each in pool]
    return found


def measure(
    processes: dict[str, Apart], cells: Sequence[Cell], rounds: int
) -> dict[str, dict[str, list[Answer]]]:
    """Cell -> contestant -> answers, one a round; a first round warms up and does not count."""
    found: dict[str, dict[str, list[Answer]]] = {cell.label: {} for cell in cells}
    for number in range(rounds + 1):
        for cell in cells:
            answers = {name: process() for name, process in processes.items()}
            if number == 0:
                same_scores(cell, answers)
                continue
            for name, answer in answers.items():
                found[cell.label].setdefault(name, []).append(answer)
            told = ", ".join(f"{name} {each.seconds:.2f} s" for name, each in answers.items())
            print(f"round {number}, {cell.label}: {told}", flush=True)
    return found


def same_scores(cell: Cell, answers: dict[str, Answer]) -> None:
    """Show that all contestants found the same.

    Raises:
        AssertionError: they did not.
    """
    first, *others = (list(chain(*answer.scores)) for answer in answers.values())
    largest = max(abs(a - b) for each in others for a, b in zip(first, each, strict=True))
    print(f"{cell.label}: largest difference of {len(first)} scores {largest:.1e}")
    assert largest < 1e-3, f"{cell.label}: scores differ by {largest}"


def summary(found: dict[str, dict[str, list[Answer]]]) -> dict[str, Any]:
    """Candidates a second, and ours over the fastest of theirs."""
    table: dict[str, Any] = {}
    for label, by_name in found.items():
        count = sum(map(len, next(iter(by_name.values()))[0].scores))
        row: dict[str, Any] = {"candidates": count}
        seconds = {name: [a.seconds for a in answers] for name, answers in by_name.items()}
        for name, each in seconds.items():
            row[name] = {"candidates_per_second": round(count / statistics.median(each), 3)}
        theirs = [name for name in by_name if name.startswith("harness")]
        best = max(theirs, key=lambda name: row[name]["candidates_per_second"], default=None)
        for name in by_name:
            if best is None or name in theirs:
                continue
            row[name]["times_faster"] = {"than": best, **ratios(seconds[best], seconds[name])}
        table[label] = row
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", help="the folder of the tasks' files (default: $FSD)")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--shots", nargs="+", type=int, default=[0, 5, 32])
    parser.add_argument("--questions", type=int, default=16, help="of a task in a turn")
    parser.add_argument("--shapes", nargs="+", default=["6x384", "12x768"],
                        metavar="LAYERSxWIDTH")  # fmt: skip
    parser.add_argument("--harness-batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, help="for models (default: a temporary one)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cells = cells_of(args.tasks, args.shots, args.questions, args.data_dir)
    way = Way(args.threads, args.clock, args.device)
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.shapes:
            shape = twins.Shape.of(name)
            path = twins.make((args.folder or Path(temporary)) / name, shape, texts_of(cells))
            processes = {
                "ours": Apart(contestants.ours, path, cells, way, False),
                "ours, prompts scored": Apart(contestants.ours, path, cells, way, True),
            }
            for size in args.harness_batches:
                processes[f"harness, batch {size}"] = Apart(
                    contestants.harness, path, shape, cells, way, size
                )
            results[name] = summary(measure(processes, cells, args.rounds))
            for process in processes.values():
                process.close()
    settings = {name: getattr(args, name) for name in "questions rounds clock device".split()}
    record({"machine": machine(args.threads), **settings, "results": results}, args.out)


if __name__ == "__main__":
    main()
