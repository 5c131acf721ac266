"""Breaks the code on purpose, one invariant at a time, and checks that a test notices.

    python -m tests.mutants [--only WORD]        (make mutants)

Each mutant is one replacement in one file of a scratch copy of the tree, and the tests that must then fail. A mutant
that no test kills, or whose text is not found any more, is an error. Not part of ``make test``: it runs the tests of
many broken trees.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "*_cache", "__pycache__", "*.egg-info", "data", ".hypothesis"
)

LONGEST = 300.0  # seconds; a mutant may make a test wait for ever

MIXED = "tests/oracle/test_mixed_tiny.py"
ENGINE = "tests/unit/engine/test_engine.py"
PROBE = "tests/unit/engine/test_probe.py"
SEQ2SEQ = "tests/oracle/test_seq2seq.py::test_every_method"


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in ``file``; one of ``tests`` must fail. ``invariant`` is DESIGN's number and what breaks."""

    invariant: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "1 right delta: neighbours of another delta are joined",
        "deltas/batch.py",
        "            and last.delta is segment.delta\n",
        "            and last.delta is not None\n",
        (MIXED,),
    ),
    Mutant(
        "1 right delta: every delta is applied to the first rows",
        "deltas/ops/table.py",
        "part[:, :, ROW0] = segment.row0",
        "part[:, :, ROW0] = 0",
        (MIXED,),
    ),
    Mutant(
        "4 tenants: keys and values are shared between them",
        "server/engine/sharing.py",
        "    return seq.tenant, seq.digest\n",
        '    return "", seq.digest\n',
        ("tests/unit/engine/test_sharing.py",),
    ),
    Mutant(
        "1 right delta: keys and values are shared between deltas",
        "server/engine/sharing.py",
        "    return seq.tenant, seq.digest\n",
        '    return seq.tenant, ""\n',
        ("tests/unit/engine/test_sharing.py",),
    ),
    Mutant(
        "1 right delta: an encoder-decoder's decoder has its encoder's plan",
        "deltas/hooks.py",
        "plan = self.decoder_plan if group.decoder else self.plan",
        "plan = self.plan",
        (SEQ2SEQ,),
    ),
    Mutant(
        "1 right row: relative positions do not count a prefix",
        "server/engine/t5_bias.py",
        "anchors = [b.lead + t for",
        "anchors = [t for",
        (SEQ2SEQ,),
    ),
    Mutant(
        "1 right row: cross-attention sees a key too few",
        "server/engine/seq2seq.py",
        "row.cross[layer].length + row.read for row",
        "row.cross[layer].length + row.read - 1 for row",
        (SEQ2SEQ,),
    ),
    Mutant(
        "1 right delta: a kept plan is used for other deltas",
        "server/engine/composition.py",
        "key = (tuple(id(delta) for delta in deltas), tuple(sizes))",
        "key = (len(deltas), tuple(sizes))",
        (MIXED, ENGINE),
    ),
    Mutant(
        "1 right delta: positions do not shift by a prompt",
        "server/engine/runner.py",
        "first = row.start + (0 if delta is None else delta.shift)",
        "first = row.start",
        (MIXED,),
    ),
    Mutant(
        "1 right delta: a part's gain also scales what is added to the whole",
        "deltas/pack.py",
        "for m in ordered]\n    if not apart",
        "for m in ordered]\n    apart = True\n    if not apart",
        ("tests/unit/test_pack.py",),
    ),
    Mutant(
        "2 no silent no-op: tensors that mean nothing are passed over",
        "deltas/formats/plan.py",
        "    if names:\n        raise InvalidDelta(",
        "    if names and len(names) > 1000:\n        raise InvalidDelta(",
        ("tests/unit/formats/test_peft_refused.py", "tests/unit/formats/test_adapterhub.py"),
    ),
    Mutant(
        "2 no silent no-op: unknown keys of a config are passed over",
        "deltas/formats/plan.py",
        "        if key not in checks:\n            raise",
        "        if key not in checks:\n            continue\n            raise",
        ("tests/unit/formats/test_peft_refused.py", "tests/unit/formats/test_adapterhub.py"),
    ),
    Mutant(
        "5 the backbone never changes: a hook writes to its weight",
        "deltas/hooks.py",
        "            plan.apply(self.group.index, rows_in, y, self)\n",
        "            plan.apply(self.group.index, rows_in, y, self)\n"
        "            self.members[0].weight.data.mul_(1.001)\n",
        ("tests/oracle/test_backbone_unchanged.py",),
    ),
    Mutant(
        "5 the backbone never changes: an embedding is changed where it lies",
        "deltas/hooks.py",
        "        y = own(ids)\n",
        "        y = own(ids)\n        own.__self__.weight.data[0] += 1\n",
        ("tests/oracle/test_backbone_unchanged.py",),
    ),
    Mutant(
        "6 every row ends: residents that are in use never give way to one that waits",
        "server/engine/residency.py",
        "if self._claims.overdue:",
        "if False:",
        ("tests/unit/engine/test_claims.py",),
    ),
    Mutant(
        "6 every row ends: the row that is passed over for its delta is not asked about first",
        "server/engine/waiting.py",
        "if self._favoured is None:",
        "if False:",
        ("tests/unit/engine/test_claims.py",),
    ),
    Mutant(
        "fair share: a tenant's weight does not count",
        "server/engine/waiting.py",
        "self._served[tenant] += tokens / self._weights[tenant]",
        "self._served[tenant] += tokens",
        ("tests/unit/engine/test_fair_share.py::test_three_tenants_get_what_their_weights_say",),
    ),
    Mutant(
        "7 poison: NaN passes the upload",
        "deltas/formats/files.py",
        "if not sure and not bool(torch.isfinite(tensor).all()):",
        "if False:",
        ("tests/unit/formats/test_peft_refused.py",),
    ),
    Mutant(
        "7 poison: NaN reaches neighbours through 0 * NaN",
        "deltas/ops/dense.py",
        "torch.where(part.mask, h, torch.zeros((), dtype=h.dtype, device=h.device))",
        "(h * part.mask)",
        ("tests/unit/ops/test_poison.py",),
    ),
    Mutant(
        "7 poison: a row of NaN is answered",
        "server/engine/engine.py",
        "                self._poisoned(seq)\n                continue\n",
        "                pass\n",
        (ENGINE,),
    ),
    Mutant(
        "7 poison: a header may claim any size",
        "deltas/formats/header.py",
        "if length > MAX_HEADER_BYTES or length > size - _LENGTH_BYTES:",
        "if length > size - _LENGTH_BYTES and length < 0:",
        ("tests/unit/formats/test_header.py",),
    ),
    Mutant(
        "2 no silent no-op: a delta that changes nothing is accepted",
        "server/store/acceptance.py",
        "            if whole:\n",
        "            if whole or zero:\n",
        ("tests/api/test_acceptance.py",),
    ),
    Mutant(
        "2 no silent no-op: a site that the pass never comes to goes unnoticed",
        "server/engine/probe.py",
        "if missed := sorted(set(delta.patches) - watch.asked):",
        "if missed := sorted(set[int]()):",
        (PROBE,),
    ),
    Mutant(
        "7 poison: a probe's NaN goes unnoticed",
        "server/engine/probe.py",
        "if not bool(torch.isfinite(logits[sound]).all()):",
        "if not bool(torch.isfinite(own[sound]).all()):",
        (PROBE,),
    ),
    Mutant(
        "7 poison: a probe writes where a row's keys are",
        "server/engine/probe.py",
        "[runner.scratch_slot], [prefix]",
        "[0], [prefix]",
        (PROBE,),
    ),
    Mutant(
        "7 poison: an archive may name a path outside its folder",
        "server/api/archives.py",
        'if path.startswith("/") or ".." in parts or path[1:2] == ":":',
        'if path.startswith("/"):',
        ("tests/api/test_archives.py",),
    ),
)


def survives(mutant: Mutant, folder: Path) -> str | None:
    """None if a test fails on the mutant, else what went wrong."""
    path = folder / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"the text is there {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        print(f"    hung for {LONGEST:.0f} s")
        return None
    finally:
        path.write_text(text)
    if done.returncode == 1:
        killers = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print(f"    {killers[0].split(' - ')[0] if killers else done.stdout[-200:]}")
        return None
    return "no test noticed" if done.returncode == 0 else f"pytest ended with {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutants whose description contains this")
    args = parser.parse_args()
    alive = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tree"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        for mutant in MUTANTS:
            if args.only not in mutant.invariant:
                continue
            print(mutant.invariant, flush=True)
            problem = survives(mutant, folder)
            if problem is not None:
                alive += 1
                print(f"    ALIVE: {problem}", flush=True)
    sys.exit(f"{alive} mutants are alive" if alive else 0)


if __name__ == "__main__":
    main()
