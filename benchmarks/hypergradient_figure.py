"""The figure of `hypergradient.py`: time per inner step and memory against K, one row a case."""

from pathlib import Path
from typing import Any

from benchmarks.common.numbers import Content, entries, memory, per_step
from metakd.monitor.plots._drawing import new_figure, plain_log_ticks

# Okabe and Ito's palette; metakd's methods have full lines.
STYLES = {
    "OneStep": ("#E69F00", "*", "-"),
    "Unroll": ("#56B4E9", "s", "-"),
    "Adjoint": ("#D55E00", "o", "-"),
    "Adjoint, forward": ("#D55E00", "o", ":"),
    "IdentityJacobian": ("#009E73", "^", "-"),
    "FiniteDifference": ("#CC79A7", "v", "-"),
    "TorchOpt MetaSGD": ("#0072B2", "D", "--"),
    "higher": ("#000000", "x", ":"),
    "by hand": ("#777777", "+", "-."),
}


def draw(content: Content, path: Path) -> None:
    """Draw every method that was measured."""
    cases, all_steps = entries(content, "case"), sorted(entries(content, "steps"))
    title = "What a hypergradient through K inner steps costs"
    figure, axes = new_figure(len(cases), 2, (10, 0.9 + 2.9 * len(cases)), title, sharex=True)
    drawn: dict[str, Any] = {}
    for case, (time, megabytes) in zip(cases, axes, strict=True):
        for panel, value in ((time, per_step), (megabytes, memory)):
            for name, (colour, marker, dash) in STYLES.items():
                known = {k: v for k in all_steps if (v := value(content, case, k, name)) is not None}
                if known:
                    size = 10 if marker == "*" else 6
                    (drawn[name],) = panel.plot(
                        list(known),
                        list(known.values()),
                        dash,
                        color=colour,
                        marker=marker,
                        markersize=size,
                        fillstyle="none",
                    )
        time.axhline(1, color="#777777", linewidth=0.8)
        if (one := memory(content, case, all_steps[0], "plain")) is not None:
            drawn["plain step"] = megabytes.axhline(one, color="#777777", linewidth=0.8)
        time.set(title=case, ylabel="time per inner step\n(plain steps)", ylim=(0, None))
        megabytes.set(title=case, ylabel="memory of a call (MB)", xscale="log", yscale="log")
        megabytes.set_xticks(all_steps, map(str, all_steps), minor=False)
        megabytes.minorticks_off()
        plain_log_ticks(megabytes)
    for panel in axes[-1]:
        panel.set_xlabel("inner steps K")
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
