"""`varestorer parity`: our networks against frozen tensors of the published ones."""

from __future__ import annotations

from varestorer.commands.entry import FAILED, OK, Command, say
from varestorer.commands.options import ParityOptions
from varestorer.parity import compare


def parity(options: ParityOptions) -> int:
    """Compare every golden tensor of `options.fixtures` and say how each fared; UsageError if they cannot be read."""
    say(f"{'tensor':58} {'max error':>10} {'tolerance':>10}  ok")
    checks = []
    for check in compare(options.fixtures):
        checks.append(check)
        say(f"{check.name:58} {check.error:10.2e} {check.tolerance:10.0e}  {'yes' if check.ok else 'NO'}")
    over = [check for check in checks if not check.ok]
    floats = [check for check in checks if 0 < check.tolerance < 1]
    worst = max(floats, key=lambda check: check.error / check.tolerance)
    say(f"\n{len(checks)} golden tensors of {options.fixtures}: {len(over)} over the tolerance")
    say(f"worst float: {worst.error:.2e} ({worst.name})")
    for check in over:
        say(f"over: {check.name}  {check.error:.2e} > {check.tolerance:.0e}")
    return FAILED if over else OK


COMMAND = Command("parity", parity, ParityOptions)
