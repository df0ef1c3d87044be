/**
 * The chat of the session gateway: plain ES modules, no build step.
 *
 *   <script type="module" src="https://gateway.example/widget.js" data-agent="support"></script>
 *
 * This module is what every page view loads: it shows the launcher once the page is idle, and brings the chat itself when
 * the visitor wants it. Everything is in a shadow root; without a window it can be imported, and does nothing.
 */

import { SessionManager } from './session.js';
import { AgentService, AgentError } from './service.js';
import { button, el, icon, readableOn, sheet } from './dom.js';

export { SessionManager, AgentService, AgentError };

/** @typedef {import('./texts.js').Texts} Texts */
/**
 * @typedef {object} MountOptions
 * @property {string} agent  its name or id
 * @property {string} [title]  over the conversation
 * @property {string} [greeting]  the first message shown
 * @property {string} [color]  any CSS colour; text on it is black or white, whichever is readable
 * @property {'right' | 'left'} [position]  of the launcher
 * @property {'auto' | 'light' | 'dark'} [theme]  auto: as the visitor's system
 * @property {'ltr' | 'rtl'} [dir]  else the page's
 * @property {Partial<Texts>} [texts]  words in another language
 * @property {boolean} [open]  open at once
 * @property {HTMLElement} [target]  show the chat in this element, without a launcher
 * @property {string} [base]  the gateway's address, if it is not where this module came from
 * @property {import('./service.js').UserToken} [userToken]  what the site signed for a user who is logged in, or what fetches it
 */
/** @typedef {{element: HTMLElement, open: () => Promise<void>, close: () => void, remove: () => void, setUserToken: (userToken: import('./service.js').UserToken) => void}} Chat */

const ACCENT = '#1f6f54';
const REFUSALS = ['domain_not_allowed', 'agent_not_found', 'agent_inactive', 'channel_not_allowed'];

const LAUNCHER = `
:host { all: initial !important; display: block !important; --edge: 20px; color-scheme: light !important; }
:host([data-inline]) { height: 100% !important; }
:host([data-theme=dark]) { color-scheme: dark !important; }
:host([hidden]), [hidden] { display: none !important; }
.launcher { position: fixed; z-index: 2147483000; bottom: calc(var(--edge) + env(safe-area-inset-bottom)); right: var(--edge);
  width: 60px; height: 60px; display: grid; place-items: center; border: 0; border-radius: 50%; padding: 0; cursor: pointer;
  background: var(--accent); color: var(--on-accent); box-shadow: 0 1px 3px rgb(0 0 0 / .2), 0 8px 26px rgb(0 0 0 / .24);
  transition: transform .18s cubic-bezier(.2, .8, .3, 1.3); }
.left .launcher { right: auto; left: var(--edge); }
.launcher:hover { transform: scale(1.06); }
.launcher:active { transform: scale(.96); }
.launcher:focus-visible { outline: 3px solid var(--accent); outline-offset: 3px; box-shadow: 0 0 0 3px #fff; }
.launcher svg { grid-area: 1 / 1; width: 27px; height: 27px; transition: opacity .18s, transform .18s; }
.launcher svg + svg, .launcher[aria-expanded=true] svg:first-child { opacity: 0; transform: rotate(-40deg) scale(.6); }
.launcher[aria-expanded=true] svg + svg { opacity: 1; transform: none; }
.launcher[aria-busy=true] svg { animation: wait .7s ease-in-out infinite alternate; }
@keyframes wait { to { opacity: .35; } }
.probe { position: absolute; visibility: hidden; background: var(--accent); }
svg { display: block; fill: none; stroke: currentColor; stroke-width: 1.9; stroke-linecap: round; stroke-linejoin: round; }
@media (max-width: 480px) { :host { --edge: 16px; } .launcher[aria-expanded=true] { display: none; } }
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
`;

/** Put the chat on the page. @param {MountOptions} options @returns {Chat} */
export function mount(options) {
  const { agent, position = 'right', theme = 'auto', target, base, userToken } = options;
  if (!agent) throw new TypeError('mount: which agent?');
  const session = SessionManager.getInstance(agent);
  const service = new AgentService({ session, userToken, ...(base ? { base } : {}) });
  const element = document.createElement('div');
  const root = element.attachShadow({ mode: 'open' });
  root.adoptedStyleSheets = [sheet(LAUNCHER)]; // unlike a style element, it works under a strict Content-Security-Policy
  const frame = el('div', { class: target ? 'inline' : position, dir: options.dir ?? getComputedStyle(target ?? document.body).direction });
  const launcher = button(
    options.texts?.open ?? 'Open the chat',
    'launcher',
    icon('M12 4c5 0 9 3.3 9 7.5S17 19 12 19c-1 0-2-.1-2.9-.4L4.5 20.5l1-3.6C3.9 15.5 3 13.6 3 11.5 3 7.3 7 4 12 4ZM8 11.5h.01M12 11.5h.01M16 11.5h.01'),
    icon('M6 9.5l6 6 6-6'),
  );
  launcher.setAttribute('aria-expanded', 'false');
  if (!target) frame.append(launcher);
  const probe = el('i', { class: 'probe' });
  root.append(frame, probe);
  element.hidden = true;
  element.toggleAttribute('data-inline', Boolean(target));
  (target ?? document.body).append(element);

  const dark = matchMedia('(prefers-color-scheme: dark)');
  const paint = () => {
    element.dataset.theme = theme === 'auto' ? (dark.matches ? 'dark' : 'light') : theme;
    const accent = options.color || getComputedStyle(element).getPropertyValue('--chat-accent').trim() || ACCENT;
    element.style.setProperty('--accent', accent);
    element.style.setProperty('--on-accent', readableOn(probe));
  };
  paint();
  dark.addEventListener('change', paint);

  /** @param {unknown} error @returns {boolean} whether the chat may not be here */
  const refused = (error) => {
    if (!(error instanceof AgentError) || !REFUSALS.includes(error.code)) return false;
    const why = error.code === 'domain_not_allowed' ? `its allowed_domains do not contain ${location.hostname}` : error.title;
    console.error(`[chat] No chat with the agent "${agent}" on this site: ${why} (${error.code}).`);
    remove();
    return true;
  };

  /** @type {Promise<import('./panel.js').Panel> | undefined} */
  let loading;
  const load = () => {
    loading ??= import('./panel.js').then(({ createPanel }) => createPanel({ ...options, element, root, frame, launcher, session, service, refused, closed }));
    loading.catch((error) => {
      loading = undefined; // the next click tries again
      console.warn('[chat] The chat could not be loaded.', error);
    });
    return loading;
  };
  const memory = `gateway_open:${agent}`;
  let wanted = false;
  /** @param {boolean} focus */
  const open = async (focus) => {
    wanted = true;
    launcher.setAttribute('aria-busy', 'true');
    try {
      const panel = await load();
      if (wanted) panel.show(focus);
      if (wanted) remember(memory, '1');
    } finally {
      launcher.removeAttribute('aria-busy');
    }
  };
  const closed = () => {
    wanted = false;
    remember(memory, null);
  };
  const close = () => {
    closed();
    loading?.then((panel) => panel.hide()).catch(() => {});
  };
  const remove = () => {
    closed();
    dark.removeEventListener('change', paint);
    loading?.then((panel) => panel.remove()).catch(() => {});
    element.remove();
  };
  launcher.addEventListener('click', () => (wanted ? close() : void open(true).catch(() => {})));
  for (const hint of ['pointerenter', 'focus']) launcher.addEventListener(hint, () => void load().catch(() => {}), { once: true });

  service.check(agent).catch((error) => {
    if (!refused(error)) return; // no connection just now is no reason to hide the chat
    throw error;
  }).then(() => {
    element.hidden = false;
    if (target || options.open || remembered(memory)) void open(false).catch(() => {});
  }, () => {});

  return { element, open: () => open(true), close, remove, setUserToken: (token) => service.setUserToken(token) };
}

/** @param {string} name @param {string | null} value  for this tab: the chat stays open from page to page */
function remember(name, value) {
  try {
    if (value === null) sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, value);
  } catch {
    // storage is blocked
  }
}

/** @param {string} name */
function remembered(name) {
  try {
    return sessionStorage.getItem(name) !== null;
  } catch {
    return false;
  }
}


/** @param {() => void} run  once the page has loaded and has nothing else to do */
function whenIdle(run) {
  const idle = () => ('requestIdleCallback' in globalThis ? requestIdleCallback(run, { timeout: 4000 }) : setTimeout(run, 200));
  if (document.readyState === 'complete') idle();
  else addEventListener('load', idle, { once: true });
}

/** The options of a script tag. @param {DOMStringMap} data @returns {MountOptions} */
function optionsOf({ agent = '', title, greeting, color, position, theme, dir, texts, open, target, base, userToken }) {
  const found = target ? document.querySelector(target) : null;
  if (target && !found) console.warn(`[chat] data-target: there is no ${target} on this page.`);
  return /** @type {MountOptions} */ ({
    agent, title, greeting, color, position, theme, dir, base, userToken,
    texts: texts ? JSON.parse(texts) : undefined,
    open: open !== undefined && open !== 'false',
    target: found ?? undefined,
  });
}

// The tags that brought this module: one chat each. A line that is on the page twice is one chat.
/** @type {Set<string>} */
const places = new Set();
for (const tag of globalThis.document?.querySelectorAll('script[data-agent]') ?? []) {
  const { src, dataset } = /** @type {HTMLScriptElement} */ (tag);
  const place = `${dataset.agent} ${dataset.target ?? ''}`;
  if (src !== import.meta.url || places.has(place)) continue;
  places.add(place);
  whenIdle(() => mount(optionsOf(dataset)));
}
