"""The look of a run's page: one style sheet, light and dark, for wide and narrow screens. Knows no documents."""

from __future__ import annotations

from typing import Final

__all__ = ["STYLE"]

STYLE: Final = """
:root {
  --ground: #ffffff; --ink: #1c2126; --dim: #5d6873; --line: #dfe4e9; --soft: #f4f6f8; --link: #1659a8;
  --ok: #1a7f45; --partial: #94600a; --failed: #b3261e; --hit: #8fb8de; --computed: #2a6fb5; --empty: #c9d0d7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181c; --ink: #e4e8ec; --dim: #98a4b0; --line: #2d353d; --soft: #1c2228; --link: #7db5f0;
    --ok: #58c586; --partial: #e0aa4e; --failed: #f2857c; --hit: #3d648a; --computed: #68a9e6; --empty: #46515c;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 60px; }
nav { font-size: 14px; }
a { color: var(--link); }
h1 { margin: 8px 0 16px; font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 8px; font-size: 18px; }
section { margin: 28px 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px 20px; margin: 0 0 20px; }
dt { color: var(--dim); font-size: 13px; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
code, pre { font: 13px/1.5 ui-monospace, monospace; }
dd code { font-weight: 400; }
.dim { color: var(--dim); }
.box { padding: 12px 14px; border-left: 4px solid var(--ok); background: var(--soft); overflow-wrap: anywhere; }
.box.bad { border-color: var(--failed); white-space: pre-line; }
.badge { padding: 2px 9px; border: 1px solid; border-radius: 10px; font-size: 13px; font-weight: 600;
  vertical-align: middle; white-space: nowrap; color: var(--dim); }
.badge.ok { color: var(--ok); } .badge.partial { color: var(--partial); } .badge.failed { color: var(--failed); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--dim); font-size: 13px; font-weight: 500; white-space: nowrap; }
th.n, td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td { overflow-wrap: anywhere; min-width: 5em; }
td.n { min-width: 0; }
.share, .bar { display: flex; height: 5px; margin-top: 4px; min-width: 130px; border-radius: 2px; overflow: hidden; }
.share i, .bar i { display: block; min-width: 2px; }
.share .hit { background: var(--hit); } .share .computed, .bar i { background: var(--computed); }
.share .empty { background: var(--empty); } .share .error { background: var(--failed); }
details { border-bottom: 1px solid var(--line); padding: 10px 0; }
summary { cursor: pointer; font-weight: 600; }
details > * + * { margin-top: 10px; }
pre { margin: 0; overflow-x: auto; padding: 12px; background: var(--soft); }
"""
