"""Train a grid of routers, numbers of experts and seeds under one budget, and report how they compare.

If killed, rerun the same command to resume: finished runs are skipped, others continue from their last checkpoint. SPEC is a YAML
file, described in docs/study.md; examples are recipes/*/study.yaml.

examples:
  fairseq-sparsemixer study recipes/multi30k_en_de/study.yaml --out runs/study --dry-run
  fairseq-sparsemixer study recipes/multi30k_en_de/study.yaml --out runs/study --json results.json
"""

import argparse
import shlex
import sys
from pathlib import Path

from fairseq_sparsemixer.cli.folder import folder

MOST_WORKERS = 10_000
CHOSEN = "CHOSEN"  # in a dry run, for a value that tuning has not chosen yet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study's file, the output folder, and what to do."""
    parser.add_argument("spec", metavar="SPEC", type=Path, help="the study, a YAML file")
    parser.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder of runs, tables and plots")
    parser.add_argument("--workers", type=int, metavar="N", help="runs at the same time (default: one a GPU, or one a CPU core)")
    parser.add_argument("--dry-run", action="store_true", help="print the command lines and run nothing")
    parser.add_argument("--report-only", action="store_true", help="report the finished runs and start none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here (default: DIR/results.json only)")


def run(options: argparse.Namespace) -> int:
    """Run what is missing, then report. Exit status 1 if a run failed, 130 after an interruption."""
    from fairseq_sparsemixer.cli.json_file import require_json, write_json
    from fairseq_sparsemixer.cli.unused import refuse_unused
    from fairseq_sparsemixer.errors import ConfigurationError
    from fairseq_sparsemixer.files import write_whole
    from fairseq_sparsemixer.tools.programs import INTERRUPTED, interrupted_by_sigterm
    from fairseq_sparsemixer.tools.study import plots, report, results
    from fairseq_sparsemixer.tools.study.claims import run_folder
    from fairseq_sparsemixer.tools.study.commands import train_command
    from fairseq_sparsemixer.tools.study.runner import progress_display, run_study
    from fairseq_sparsemixer.tools.study.spec import check_flags, read_study
    from fairseq_sparsemixer.tools.study.tuning import tuned

    if options.dry_run:
        refuse_unused(options, "report_only workers json", "changes nothing in a --dry-run")
    if options.report_only:
        refuse_unused(options, "workers", "changes nothing with --report-only, which runs nothing")
    if options.workers is not None and not 1 <= options.workers <= MOST_WORKERS:
        raise ConfigurationError(f"--workers {options.workers} must be at least 1 and at most {MOST_WORKERS:,}")
    require_json(options.json and str(options.json), [str(options.spec)])
    study = read_study(options.spec)
    check_flags(options.spec, study)
    if options.dry_run:
        for planned in [*study.trials(), *tuned(study, options.out, missing=CHOSEN).runs()]:
            print(shlex.join(train_command(study, planned, run_folder(options.out, planned))))
        return 0
    failures = []
    if not options.report_only:
        try:
            with interrupted_by_sigterm(), progress_display() as progress:
                failures = run_study(study, options.out, options.workers, progress)
        except KeyboardInterrupt:
            print("fairseq-sparsemixer: interrupted; rerun the same command to resume", file=sys.stderr)
            return INTERRUPTED
    gathered = results.gather(study, options.out)
    if not gathered["runs"]:
        scored = "" if study.test is None else ", and scored as its test says"
        ends = failures or ["run it without --report-only"]
        raise ConfigurationError("; ".join([f"no run of {options.spec} is finished in {options.out}{scored}", *ends]))
    for path in filter(None, (options.out / "results.json", options.json)):
        write_json(path, gathered)
    table = report.markdown(gathered)
    try:
        write_whole(options.out / "results.md", table)
        plots.draw(study, gathered, options.out)
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename or options.out} cannot be written ({error.strerror}); give another --out"
        ) from None
    print(table)
    for failure in failures:
        print(failure)
    return 1 if failures else 0
