/** The style sheet of the open chat. Sizes are in px, because em and rem would follow the host page. */

export const STYLE = `
.panel { --paper: #fff; --ink: #1a201e; --soft: #59635f; --line: #e2e7e4; --bubble: #f1f4f2; --alarm: #b3261e; --well: #e7ecea;
  text-align: start; -webkit-font-smoothing: antialiased; }
:host([data-theme=dark]) .panel { --paper: #161a19; --ink: #e8edea; --soft: #a2aeaa; --line: #2d3533; --bubble: #232a28;
  --alarm: #ff9c93; --well: #0f1312; }
:where(.panel, .panel *) { box-sizing: border-box; margin: 0; font: inherit; color: inherit; letter-spacing: normal; }
.panel { font: 400 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); position: fixed; z-index: 1; bottom: calc(var(--edge) + 76px); right: var(--edge); width: 400px;
  max-width: calc(100vw - 2 * var(--edge)); height: min(680px, 100dvh - var(--edge) * 2 - 76px); display: flex;
  flex-direction: column; overflow: hidden; background: var(--paper); border-radius: 20px;
  box-shadow: 0 0 0 1px rgb(0 0 0 / .07), 0 12px 28px rgb(0 0 0 / .12), 0 28px 80px rgb(0 0 0 / .2); transform-origin: bottom right;
  animation: open .24s cubic-bezier(.2, .9, .3, 1.05); }
:host([data-theme=dark]) :not(.inline) > .panel { box-shadow: 0 0 0 1px var(--line), 0 24px 70px rgb(0 0 0 / .6); }
.left .panel { right: auto; left: var(--edge); transform-origin: bottom left; }
.inline, .inline .panel { position: relative; inset: auto; width: 100%; max-width: none; height: 100%; min-height: 320px; }
:host .inline .panel { box-shadow: inset 0 0 0 1px var(--line); animation: none; border-radius: 16px; z-index: 0; }
@keyframes open { from { opacity: 0; transform: translateY(14px) scale(.97); } }
button { border: 0; background: none; padding: 0; cursor: pointer; }
button:disabled { cursor: default; }
.panel :focus-visible { outline: 2px solid var(--ink); outline-offset: 2px; }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }

header { flex: none; display: flex; align-items: center; gap: 4px; padding-block: 14px; padding-inline: 20px 12px; background: var(--accent);
  color: var(--on-accent); }
h2 { flex: 1; min-width: 0; font-weight: 650; font-size: 17px; line-height: 1.3; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
header button { width: 38px; height: 38px; display: grid; place-items: center; border-radius: 50%; transition: background .15s; }
header button:hover { background: color-mix(in srgb, currentColor 16%, transparent); }
header button:focus-visible { outline-color: var(--on-accent); outline-offset: -3px; }
header svg { width: 21px; height: 21px; }
.bar { flex: none; display: flex; flex-wrap: wrap; align-items: center; gap: 8px 10px; padding: 10px 20px; font-size: 13.5px;
  background: var(--well); border-bottom: 1px solid var(--line); }
.bar p { flex: 1 1 100%; }
.pill { padding: 5px 13px; border-radius: 99px; border: 1px solid var(--soft); font-size: 13.5px; font-weight: 550; }
.pill:hover { background: color-mix(in srgb, var(--ink) 9%, transparent); }
.pill.main { background: var(--ink); border-color: var(--ink); color: var(--paper); }
.pill.main:hover { opacity: .88; }

.log { flex: 1; min-height: 0; overflow-y: auto; overscroll-behavior: contain; scrollbar-width: thin; padding: 20px 16px 8px;
  display: flex; flex-direction: column; gap: 4px; }
.log:focus-visible { outline-offset: -3px; border-radius: 4px; }
.log > :first-child { margin-top: auto; }
.message { display: flex; flex-direction: column; max-width: 86%; align-items: flex-start; align-self: flex-start; margin-top: 8px;
  animation: rise .2s ease-out; }
.message.user { align-self: flex-end; align-items: flex-end; }
.message + .message:not(.user) { margin-top: 4px; }
.text { max-width: 100%; padding: 10px 15px; border-radius: 20px; overflow-wrap: anywhere; background: var(--bubble); }
.message:not(.user) > .text, .dots { border-bottom-left-radius: 6px; }
[dir=rtl] .message:not(.user) > .text, [dir=rtl] .dots { border-bottom-left-radius: 20px; border-bottom-right-radius: 6px; }
.user > .text { white-space: pre-wrap; background: var(--accent); color: var(--on-accent); border-bottom-right-radius: 6px; }
[dir=rtl] .user > .text { border-bottom-right-radius: 20px; border-bottom-left-radius: 6px; }
.text:empty { display: none; }
.plain { white-space: pre-wrap; }
.text > .plain { margin: 0; }
.meta { display: flex; align-items: center; flex-wrap: wrap; gap: 2px 8px; padding: 3px 6px 0; min-height: 0; font-size: 12.5px; line-height: 1.5;
  color: var(--soft); }
.meta:empty { display: none; }
.failed { width: 100%; max-width: 100%; }
.failed > .text { max-width: 86%; }
.failed > .meta { color: var(--alarm); justify-content: flex-end; }
.meta button { font-weight: 600; text-decoration: underline; text-underline-offset: 3px; border-radius: 4px; color: var(--ink); }
.dots { display: flex; gap: 5px; padding: 16px 17px; border-radius: 20px; background: var(--bubble); }
.dots i { width: 7px; height: 7px; border-radius: 50%; background: var(--soft); animation: dot 1.2s ease-in-out infinite; }
.dots i + i { animation-delay: .16s; } .dots i + i + i { animation-delay: .32s; }
@keyframes dot { 0%, 60%, 100% { opacity: .35; } 30% { opacity: 1; transform: translateY(-3px); } }
@keyframes rise { from { opacity: 0; transform: translateY(6px); } }
.note { text-wrap: balance; align-self: center; text-align: center; color: var(--soft); font-size: 13px; padding: 12px 20px 6px; max-width: 100%; }
.time { font-size: 12px; padding: 10px 20px 2px; }
.more { align-self: center; margin-bottom: 6px; }
.latest { position: absolute; left: 50%; bottom: 84px; transform: translateX(-50%); display: flex; gap: 6px; align-items: center;
  padding: 7px 14px; border-radius: 99px; font-size: 13px; font-weight: 550; background: var(--ink); color: var(--paper);
  box-shadow: 0 4px 16px rgb(0 0 0 / .25); }
.latest svg { width: 15px; height: 15px; }

.text > * + *, .text li > * + *, .text blockquote > * + * { margin-top: 9px; }
.text h3, .text h4, .text h5, .text h6 { font-weight: 650; font-size: 16px; line-height: 1.35; }
.text > * + h3, .text > * + h4 { margin-top: 14px; }
.text strong { font-weight: 650; } .text s { text-decoration: line-through; } .text em { font-style: italic; }
.text a { text-decoration: underline; text-underline-offset: 2px; text-decoration-thickness: 1px; }
.text a:hover { text-decoration-thickness: 2px; }
.text ul, .text ol { padding-inline-start: 22px; } .text ul { list-style: disc; } .text ol { list-style: decimal; }
.text li + li, .text li > ul, .text li > ol { margin-top: 4px; }
.text li::marker { color: var(--soft); }
.text blockquote { border-inline-start: 3px solid var(--soft); padding-inline-start: 12px; color: var(--soft); }
.text hr { border: 0; border-top: 1px solid var(--soft); opacity: .4; }
.text code, .text pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.text code { direction: ltr; unicode-bidi: isolate; }
.text code { display: inline-block; max-width: 100%; padding: 0 5px; border-radius: 5px; background: color-mix(in srgb, var(--ink) 9%, transparent); }
.text .wide { max-width: 100%; overflow-x: auto; scrollbar-width: thin; }
.text .code { background: var(--well); border-radius: 10px; }
.text tr:last-child td { border-bottom: 0; }
.text pre { width: max-content; min-width: 100%; padding: 11px 13px; white-space: pre; text-align: left; direction: ltr; }
.text table { border-collapse: collapse; font-size: 14px; }
.text th { font-weight: 650; text-align: start; }
.text th, .text td { padding: 5px 10px; border-bottom: 1px solid color-mix(in srgb, var(--ink) 16%, transparent); min-width: 70px; overflow-wrap: normal; }

form { flex: none; position: relative; padding: 8px 12px calc(12px + env(safe-area-inset-bottom)); }
.box { display: flex; align-items: flex-end; border: 1px solid var(--soft); border-radius: 24px; background: var(--paper); padding: 4px; transition: border-color .15s, box-shadow .15s; }
.box:focus-within { border-color: var(--ink); box-shadow: 0 0 0 3px color-mix(in srgb, var(--ink) 15%, transparent); }
textarea { flex: 1; min-width: 0; min-height: 40px; max-height: 140px; padding: 9px 4px 9px 14px; border: 0; resize: none; background: none;
  font-size: 16px; line-height: 22px; field-sizing: content; overflow-y: auto; scrollbar-width: thin; }
[dir=rtl] textarea { padding: 9px 14px 9px 4px; }
.panel textarea:focus-visible { outline: none; }
textarea::placeholder { color: var(--soft); opacity: 1; }
.send { flex: none; width: 40px; height: 40px; display: grid; place-items: center; border-radius: 50%; background: var(--accent);
  color: var(--on-accent); transition: background .15s, color .15s; }
.send[aria-disabled=true] { cursor: default; background: var(--well); color: var(--soft); }
.send svg { width: 20px; height: 20px; stroke-width: 2.2; }
.send .square { fill: currentColor; }

@media (max-width: 480px) {
  .right .panel, .left .panel { inset: 0; top: var(--screen-top, 0); bottom: auto; width: auto; max-width: none;
    height: var(--screen-height, 100dvh); border-radius: 0; box-shadow: none; }
  header { padding-top: calc(12px + env(safe-area-inset-top)); }
}
@media (max-height: 460px) { .right .panel, .left .panel { height: calc(100dvh - 16px); bottom: 8px; } }
@media (forced-colors: active) { .text, .box, .dots { border: 1px solid; } }
`;
