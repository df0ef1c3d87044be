/**
 * The public entry, served as /widget.js: the names for sites' own scripts, and a chat for each script tag with an agent.
 *
 *   <script type="module" src="https://gateway.example/widget.js" data-agent="support"></script>
 *
 * The gateway serves all other modules in a folder named by their version, so it puts `./widget/<version>/` in place of
 * each `'./` of this file. Without a window the module can be imported and does nothing.
 */

import { mount } from './launcher.js';
// Used by the launcher. A browser that finds it named here asks for it at once, instead of import by import.
import './dom.js';

export { mount };
export { SessionManager } from './session.js';
export { AgentError, AgentService } from './service.js';

/** @param {() => void} run  once the page has loaded and has nothing else to do */
function whenIdle(run) {
  const idle = () => ('requestIdleCallback' in globalThis ? requestIdleCallback(run, { timeout: 4000 }) : setTimeout(run, 200));
  if (document.readyState === 'complete') idle();
  else addEventListener('load', idle, { once: true });
}

/**
 * The options that a script tag's `data-` attributes give.
 * @param {DOMStringMap} data @returns {import('./widget.js').MountOptions}
 */
function optionsOf(data) {
  const { texts, open, target } = data;
  const found = target ? document.querySelector(target) : null;
  if (target && !found) console.warn(`[chat] data-target: there is no ${target} on this page.`);
  /** @type {any} */
  const own = { texts: texts && JSON.parse(texts), open: open !== undefined && open !== 'false', target: found ?? undefined };
  return { ...data, ...own };
}

// A tag that is on the page twice is one chat.
/** @type {Set<string>} */
const places = new Set();
for (const { src, dataset } of globalThis.document?.scripts ?? []) {
  const place = `${dataset.agent} ${dataset.target ?? ''}`;
  if (src !== import.meta.url || dataset.agent === undefined || places.has(place)) continue;
  places.add(place);
  whenIdle(() => mount(optionsOf(dataset)));
}
