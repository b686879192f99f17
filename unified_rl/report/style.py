"""The style sheet of a report, light and dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #1d1d1b; --soft: #6b6a66; --line: #e3e2de; --code: #f1f0ec;
  --good: #1a7f4b; --bad: #c0392b; --warn: #9a6200; --warn-page: #fdf3dc;
  --s0: #2a6fdb; --s1: #d9722b; --s2: #16917b; --s3: #a344b8; --s4: #8a7a1e; --s5: #c0392b; --s6: #5b6472;
  --s7: #6a4fd0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #161615; --card: #20201e; --ink: #efeeea; --soft: #a3a19a; --line: #373632; --code: #2a2926;
    --good: #5cc98d; --bad: #f08a7c; --warn: #e8b85c; --warn-page: #362c17;
    --s0: #6ea5f5; --s1: #f09a5b; --s2: #4fc4ad; --s3: #cf86e0; --s4: #cdbb55; --s5: #f08a7c; --s6: #a7b0be;
    --s7: #a997f5;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 4px; }
h3 { font-size: 14px; margin: 0; font-weight: 600; }
section > h3 { margin: 16px 0 6px; }
.charts + .note { margin-top: 10px; }
p { margin: 4px 0 12px; }
.soft, figcaption, .note { color: var(--soft); font-size: 13px; }
.note { margin: 0 0 12px; }
.alarm { background: var(--warn-page); color: var(--warn); border-radius: 10px; padding: 10px 14px; margin: 16px 0 0; }
.alarm { overflow-wrap: anywhere; } .alarm a { color: inherit; white-space: nowrap; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; margin: 20px 0 0; }
.tile, figure, .card, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 16px; }
.tile .value { font-size: 30px; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile .was { color: var(--soft); font-weight: 400; font-size: 20px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 12px; }
figure { margin: 0; padding: 12px 14px 10px; }
figure svg { display: block; width: 100%; height: auto; margin: 6px 0 4px; }
.grid { stroke: var(--line); fill: none; } .axis { stroke: var(--soft); fill: none; opacity: .6; }
.tick { fill: var(--soft); font-size: 10.5px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line, .key { stroke: var(--c); }
.dot, .band { fill: var(--c); }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.s4 { --c: var(--s4); } .s5 { --c: var(--s5); } .s6 { --c: var(--s6); } .s7 { --c: var(--s7); }
.dot { stroke: var(--card); stroke-width: 1.5; }
.band { opacity: .15; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; color: var(--soft); }
.legend svg { display: inline-block; width: 16px; height: 8px; margin: 0 5px 0 0; }
.key { stroke-width: 2.5; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 12px; }
.cards.single { grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); }
.card { padding: 12px; }
.prompt {
  font-weight: 550; margin: 0 0 8px; overflow-wrap: anywhere; white-space: pre-wrap; max-height: 9em; overflow: auto;
}
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.pictures { display: flex; flex-wrap: wrap; gap: 4px; }
.pictures img { width: 100%; max-width: 256px; border-radius: 4px; background: var(--code); }
.pictures.several img { width: calc(50% - 2px); }
td .pictures { width: 96px; }
.pixel { image-rendering: pixelated; }
.rewards { margin: 4px 0 0; font-size: 12.5px; font-variant-numeric: tabular-nums; list-style: none; padding: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 8px 12px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { overflow-wrap: anywhere; white-space: pre-wrap; min-width: 160px; }
tr.warning td, tr.error td { background: var(--warn-page); }
tr.warning td.level { color: var(--warn); } tr.error td.level { color: var(--bad); }
pre { background: var(--code); border-radius: 8px; padding: 14px; overflow-x: auto; font-size: 12.5px; margin: 8px 0; }
summary { cursor: pointer; color: var(--soft); }
"""
