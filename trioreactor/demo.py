"""The demo: what the library does, shown on real servers and measured while it is shown."""

from __future__ import annotations

import os
import platform
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

import trio

import trioreactor
from trioreactor.demo_report import Report, Step, count, living_tasks, open_descriptors
from trioreactor.demo_steps import STEPS
from trioreactor.epoll_poller import HAVE_EPOLL

# A step takes one to four seconds. On a machine where it takes so long, that is to be said.
_STEP_SECONDS = 15.0


def main(steps: Sequence[Step] = STEPS) -> int:
    """Run the demo; 0 if everything held, 1 if something did not."""
    return trio.run(_demo, steps)


async def _demo(steps: Sequence[Step]) -> int:
    report = Report(sys.stdout)
    poller = os.environ.get("TRIOREACTOR_POLLER") or ("epoll" if HAVE_EPOLL else "trio")
    report.text(
        f"trioreactor {trioreactor.__version__}, trio {metadata.version('trio')}, "
        f"{platform.python_implementation()} {platform.python_version()}, {platform.system()}, "
        f"{poller} poller, {count(os.cpu_count() or 1, 'CPU')}"
    )
    report.text("Real servers on loopback; all of this is measured while you read it.")
    begun = trio.current_time()
    descriptors, tasks = open_descriptors(), living_tasks()
    for number, step in enumerate(steps, 1):
        report.title(f"{number}. {step.title}")
        await _take(step, report)
    await trio.lowlevel.checkpoint()
    report.title("Afterwards")
    if descriptors is not None:
        now = open_descriptors()
        report.check("open descriptors", f"{now}, at first {descriptors}", holds=now == descriptors)
    report.check("trio tasks", f"{living_tasks()}, at first {tasks}", holds=living_tasks() == tasks)
    report.line("the whole demo", f"{trio.current_time() - begun:.1f} s")
    if report.failures:
        verdict = f"{count(report.failures, 'line')} marked !! did not hold."
    else:
        verdict = "Everything held."
    report.text(f"\n{verdict}")
    return 1 if report.failures else 0


async def _take(step: Step, report: Report) -> None:
    """One step; whatever goes wrong in it is reported, and the others follow."""
    try:
        with trio.fail_after(_STEP_SECONDS):
            await step.run(report)
    except trio.TooSlowError:
        report.check("the step", f"was not done after {_STEP_SECONDS:g} s", holds=False)
        await trio.lowlevel.checkpoint()
    except BrokenPipeError:
        # Nobody reads the report any more.
        raise
    except Exception as error:
        report.check("the step", f"raised {error!r}", holds=False)
        traceback.print_exc()
        await trio.lowlevel.checkpoint()
