"""The style sheet of the page: light and dark, wide and narrow, on screen and on paper."""

from __future__ import annotations

_LIGHT = """--bg:#fff;--panel:#fbfbfc;--ground:#eef0f2;--ink:#1a1e23;--muted:#5c6670;--line:#e1e5e9;--ours:#0a64a4;
--stall:#8fc1e6;--stock:#bf4a06;--resident:#00735a;--h1:#d3e3f1;--h2:#b5d2e9;--h3:#8dbbde;--h4:#61a0d0;--h5:#3a83bf;
--h6:#1f67a6;--h7:#104c85;--h8:#082f5c;"""
_DARK = """--bg:#0f1318;--panel:#151a20;--ground:#1d242c;--ink:#e6eaee;--muted:#9aa5b0;--line:#2a323b;--ours:#5fb4f2;
--stall:#27608f;--stock:#e88a45;--resident:#3fc59c;--h1:#18374f;--h2:#1a4769;--h3:#1e5a87;--h4:#2b74ab;--h5:#4391cb;
--h6:#68afe3;--h7:#97cdf4;--h8:#d0ebff;"""

STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
""" + """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1240px;margin:0 auto;padding:36px 28px 56px}
h1{font-size:30px;line-height:1.2;margin:4px 0 16px;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:20px;margin:0 0 2px;letter-spacing:-.01em}h3{font-size:14px;margin:0 0 6px}
section{margin-top:48px}p{margin:0}b{font-weight:650}small{font-size:11px;color:var(--muted)}
.eyebrow,.about,.note{color:var(--muted);font-size:13px}.eyebrow span{margin-left:12px}
.about{max-width:80ch;margin-bottom:14px}.note{margin-top:6px}
.what{display:grid;grid-template-columns:max-content 1fr;gap:5px 18px;margin:0;font-size:13.5px}
.what dt{color:var(--muted)}.what dd{margin:0;overflow-wrap:anywhere;min-width:0}
.lead{font-size:20px;line-height:1.45;margin:24px 0;max-width:70ch;text-wrap:pretty}
.lead b{font-variant-numeric:tabular-nums;white-space:nowrap}
.warn{border-left:3px solid var(--stock);padding:2px 0 2px 12px;margin-top:10px;font-size:13.5px;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,190px),1fr));gap:10px}
.card{background:var(--panel);border:1px solid var(--line);border-top:3px solid var(--ours);border-radius:4px;
padding:12px 16px;font-size:13px;color:var(--muted);overflow-wrap:anywhere}
.card small{white-space:nowrap}.card.plain{border-top-color:var(--resident)}.card h3{color:var(--ink)}
.card b{font-size:25px;color:var(--ink);font-variant-numeric:tabular-nums;letter-spacing:-.02em}
.card p{line-height:1.4}.card p:last-child{margin-top:8px;padding-top:8px;border-top:1px solid var(--line)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:18px}
.column{display:grid;gap:18px}.grid>*,.column>*{min-width:0}
figure{margin:0;background:var(--panel);border:1px solid var(--line);border-radius:4px;padding:14px 16px}
figcaption{font-weight:650;font-size:14px;overflow-wrap:anywhere}
.legend{list-style:none;margin:6px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:3px 18px;font-size:12px;
color:var(--muted)}
.legend li{display:flex;gap:7px;align-items:baseline}
.ground{color:var(--ground);fill:var(--ground)}.empty{padding:24px 0;color:var(--muted)}
.costs{list-style:none;margin:10px 0 0;padding:0;font-size:13px}
.costs li{display:flex;flex-wrap:wrap;gap:0 6px;margin-top:9px}.costs span{flex:1;color:var(--muted);min-width:12em}
.costs em{font-style:normal;color:var(--muted);overflow-wrap:anywhere}
.costs b,td{font-variant-numeric:tabular-nums}.flat{flex:none;width:100%;margin-top:2px;overflow:visible}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:12px;line-height:1.3}
td,th{padding:5px 6px;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);font-weight:400}
td small{display:block;white-space:nowrap}td{white-space:nowrap}tr>th:first-child{text-align:left;white-space:nowrap}
thead th{color:var(--muted);vertical-align:bottom;font-size:11px}.group th{font-weight:650;padding-top:16px}
tbody th{position:sticky;left:0;background:var(--bg)}.lost td,.lost th{color:var(--muted);border-bottom:0}
.why td{text-align:left;padding-top:0;color:var(--stock);white-space:normal}.why span{position:sticky;left:7px}
code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap}
@media (max-width:640px){main{padding:22px 14px 40px}h1{font-size:24px}.lead{font-size:17px}figure{padding:12px 10px}
.costs li:has(em) span{flex-basis:100%}.what{grid-template-columns:1fr;gap:0}.what dd{margin-bottom:8px}}
@media print{main{padding:0;max-width:none;zoom:.64}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
figure,.card,.about,tr,.warn,dd{break-inside:avoid}h2,.about,thead,.group{break-after:avoid}section{margin-top:32px}
.grid{grid-template-columns:1fr 1fr}.wide{overflow:visible}table{font-size:11px}td,th{padding:4px}}
@page{margin:11mm}
"""
