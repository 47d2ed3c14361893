"""The look of pages of runs: one style sheet, light and dark, for wide and narrow screens. Knows no documents."""

from __future__ import annotations

from typing import Final

__all__ = ["STYLE"]

STYLE: Final = """
:root {
  --ground: #ffffff; --ink: #1c2126; --dim: #5d6873; --line: #dfe4e9; --soft: #f4f6f8; --link: #1659a8;
  --ok: #1a7a42; --partial: #8a5a08; --failed: #b3261e;
  --hit: #93abc2; --updated: #35a58f; --computed: #2563a8; --empty: #dcdcd4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181c; --ink: #e4e8ec; --dim: #98a4b0; --line: #2d353d; --soft: #1c2228; --link: #7db5f0;
    --ok: #58c586; --partial: #e0aa4e; --failed: #f2857c;
    --hit: #4d6379; --updated: #4cc3ab; --computed: #6cb0f2; --empty: #5a5d55;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 60px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px; }
nav span { display: flex; gap: 20px; } nav span + span { margin-left: auto; }
a { color: var(--link); }
h1 { margin: 10px 0 2px; font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 6px; font-size: 18px; }
p { margin: 0 0 8px; }
section { margin: 28px 0; }
small { font-size: 13px; font-weight: 400; color: var(--dim); }
ul { margin: 0; padding-left: 20px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 12px 16px; margin: 16px 0 20px; }
dt { color: var(--dim); font-size: 13px; }
dd { margin: 0; font-size: 18px; font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
dl.small { margin: 0; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); } .small dd { font-size: 15px; }
code, pre { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
.dim, .sub { color: var(--dim); }
.sub { margin-bottom: 14px; overflow-wrap: anywhere; }
.bad { color: var(--failed); }
.box { margin: 0 0 10px; padding: 10px 14px; border-left: 4px solid var(--ok); background: var(--soft);
  overflow-wrap: anywhere; }
.box.warn { border-color: var(--partial); }
.box.bad { border-color: var(--failed); color: inherit; white-space: pre-line; }
.badge { padding: 2px 9px; border: 1px solid; border-radius: 10px; font-size: 13px; font-weight: 600;
  vertical-align: middle; white-space: nowrap; color: var(--dim); }
.badge.ok { color: var(--ok); } .badge.failed { color: var(--failed); }
.badge.partial, .badge.stopped { color: var(--partial); }
tbody small { display: block; margin-top: 2px; } tbody td small { min-width: 18em; }
.wide { overflow-x: auto; margin-bottom: 8px; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 6px 16px 6px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: break-word; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--dim); font-size: 13px; font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 400; }
th.n, td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td:not(.n):has(code), td:last-child:not(.n) { overflow-wrap: anywhere; min-width: 6em; }
time { white-space: nowrap; }
.share, .bar { display: flex; gap: 1px; height: 7px; margin: 4px 0 2px; min-width: 96px; max-width: 300px; }
.bar { height: 9px; margin-top: 7px; min-width: 150px; max-width: none; }
.share i, .bar i { display: block; min-width: 2px; border-radius: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 20px; color: var(--dim); font-size: 13px; }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 6px; border-radius: 2px; }
i.hit { background: var(--hit); } i.updated { background: var(--updated); } i.empty { background: var(--empty); }
i.computed, .bar i { background: var(--computed); } i.error { background: var(--failed); }
details { border-bottom: 1px solid var(--line); padding: 8px 0; }
section details { border: 0; }
summary { cursor: pointer; }
summary h2 { display: inline; font-size: 15px; }
details > * + * { margin-top: 8px; }
pre { margin: 0; overflow-x: auto; padding: 12px; background: var(--soft); overflow-wrap: normal; }
@media (max-width: 560px) {
  body { font-size: 14px; } main { padding: 14px 12px 40px; } h1 { font-size: 22px; }
  th, td { padding-right: 10px; }
  dl { grid-template-columns: repeat(3, 1fr); } dd { font-size: 16px; }
  .bar { min-width: 60px; } tbody td small { min-width: 10em; }
}
"""
