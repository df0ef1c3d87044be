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
import { TEXTS } from './texts.js';

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
 * @property {string} [lang]  ar, de, en, es or fr; else the page's
 * @property {'ltr' | 'rtl'} [dir]  else that of `lang`, else the page's
 * @property {Partial<Texts>} [texts]  words in another language
 * @property {boolean} [open]  open at once
 * @property {HTMLElement} [target]  show the chat in this element, without a launcher
 * @property {string} [base]  the gateway's address, if it is not where this module came from
 * @property {import('./service.js').UserToken} [userToken]  what the site signed for a user who is logged in, or what fetches it
 */
/** @typedef {{element: HTMLElement, open: () => Promise<void>, close: () => void, remove: () => void, setUserToken: (userToken: import('./service.js').UserToken) => void}} Chat */

const ACCENT = '#1f6f54';
const REFUSALS = ['domain_not_allowed', 'agent_not_found', 'agent_inactive', 'channel_not_allowed'];

/** @type {Record<string, () => Promise<{TEXTS: Texts}>>} */
const LANGUAGES = {
  ar: () => import('./texts-ar.js'),
  de: () => import('./texts-de.js'),
  es: () => import('./texts-es.js'),
  fr: () => import('./texts-fr.js'),
};

// Fixed and without a size: it takes no part in the layout of the page, also where that is a grid or a flex box.
const LAUNCHER = `
:host { all: initial !important; display: block !important; position: fixed !important; z-index: 2147483000 !important;
  --edge: 20px; color-scheme: light !important; }
:host([data-inline]) { position: static !important; height: 100% !important; }
:host([data-theme=dark]) { color-scheme: dark !important; }
:host([hidden]), [hidden] { display: none !important; }
.launcher { position: fixed; z-index: 2; bottom: calc(var(--edge) + env(safe-area-inset-bottom)); right: var(--edge);
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
.badge { position: absolute; inset-block-start: -4px; inset-inline-end: -4px; min-width: 22px; height: 22px; box-sizing: border-box; padding: 0 6px;
  border-radius: 11px; background: #c8281e; color: #fff; font: 700 12.5px/22px system-ui, sans-serif; text-align: center; box-shadow: 0 0 0 2px #fff; }
.probe { position: absolute; visibility: hidden; background: var(--accent); }
svg { display: block; fill: none; stroke: currentColor; stroke-width: 1.9; stroke-linecap: round; stroke-linejoin: round; }
@media (max-width: 480px) { :host { --edge: 16px; } .launcher[aria-expanded=true] { display: none; } }
@media print { :host { display: none !important; } }
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
`;

/** @type {{agent: string, target?: HTMLElement, chat: Chat}[]} the chats on this page */
let mounted = [];

/** Put the chat on the page; where it is already, it stays as it is. @param {MountOptions} options @returns {Chat} */
export function mount(options) {
  const { agent, position = 'right', theme = 'auto', target, base, userToken } = options;
  if (!agent) throw new TypeError('mount: which agent?');
  const known = mounted.find((one) => one.agent === agent && one.target === target);
  if (known) return known.chat;
  const around = target ?? document.body;
  const lang = options.lang || /** @type {HTMLElement | null} */ (around.closest('[lang]'))?.lang || '';
  /** @type {Texts} */
  let t = { ...TEXTS, ...options.texts };
  const loadedTexts = LANGUAGES[lang.slice(0, 2).toLowerCase()]?.().then(
    (found) => void (t = { ...found.TEXTS, ...options.texts }),
    (error) => console.warn('[chat] The words of this language could not be loaded.', error),
  );
  const session = SessionManager.getInstance(agent);
  const service = new AgentService({ session, userToken, ...(base ? { base } : {}) });
  const element = document.createElement('div');
  const root = element.attachShadow({ mode: 'open' });
  root.adoptedStyleSheets = [sheet(LAUNCHER)]; // unlike a style element, it works under a strict Content-Security-Policy
  const frame = el('div', { class: target ? 'inline' : position, dir: options.dir || (options.lang ? (/^(ar|fa|he|ur)/i.test(lang) ? 'rtl' : 'ltr') : getComputedStyle(around).direction), ...(lang ? { lang } : {}) });
  const badge = el('span', { class: 'badge', hidden: '', 'aria-hidden': 'true' });
  const launcher = button(
    t.open,
    'launcher',
    icon('M12 4c5 0 9 3.3 9 7.5S17 19 12 19c-1 0-2-.1-2.9-.4L4.5 20.5l1-3.6C3.9 15.5 3 13.6 3 11.5 3 7.3 7 4 12 4ZM8 11.5h.01M12 11.5h.01M16 11.5h.01'),
    icon('M6 9.5l6 6 6-6'),
    badge,
  );
  launcher.setAttribute('aria-expanded', 'false');
  if (!target) frame.append(launcher);
  const probe = el('i', { class: 'probe' });
  root.append(frame, probe);
  element.hidden = true;
  element.toggleAttribute('data-inline', Boolean(target));
  around.append(element);
  // Some frameworks go from page to page by putting another body in place.
  const follower = new MutationObserver(() => element.isConnected || target || document.body?.append(element));
  follower.observe(document.documentElement, { childList: true });

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
    loading ??= Promise.all([import('./panel.js'), loadedTexts]).then(([{ createPanel }]) =>
      createPanel({ ...options, lang, t, element, root, frame, launcher, session, service, refused, closed, arrived }));
    loading.catch((error) => {
      loading = undefined; // the next click tries again
      console.warn('[chat] The chat could not be loaded.', error);
    });
    return loading;
  };
  const memory = `gateway_open:${agent}`;
  const unread = `gateway_unread:${agent}`;
  /** Answers that came while the chat was closed. @param {number} count */
  const tellUnread = (count) => {
    badge.hidden = !count;
    badge.textContent = count > 9 ? '9+' : String(count);
    const label = count ? `${t.open}. ${t.unread.replace('{count}', String(count))}` : t.open;
    launcher.setAttribute('aria-label', label);
    launcher.title = label;
    remember(unread, count ? String(count) : null);
  };
  const arrived = () => tellUnread(Number(remembered(unread)) + 1);
  let wanted = false;
  /** @param {boolean} focus */
  const open = async (focus) => {
    wanted = true;
    launcher.setAttribute('aria-busy', 'true');
    try {
      const panel = await load();
      if (!wanted) return;
      panel.show(focus);
      remember(memory, '1');
      tellUnread(0);
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
    mounted = mounted.filter((one) => one.chat !== chat);
    follower.disconnect();
    dark.removeEventListener('change', paint);
    loading?.then((panel) => panel.remove()).catch(() => {});
    element.remove();
  };
  // While it loads, a second click is impatience.
  launcher.addEventListener('click', () => (launcher.getAttribute('aria-expanded') === 'true' ? close() : void open(true).catch(() => {})));
  for (const hint of ['pointerenter', 'focus']) launcher.addEventListener(hint, () => void load().catch(() => {}), { once: true });

  /** @type {Chat} */
  const chat = { element, open: () => open(true), close, remove, setUserToken: (token) => service.setUserToken(token) };
  mounted.push({ agent, target, chat });

  const allowed = service.check(agent).then(() => true, (error) => !refused(error)); // no connection just now is no reason to hide the chat
  void Promise.all([allowed, loadedTexts]).then(([welcome]) => {
    if (!welcome) return;
    tellUnread(Number(remembered(unread)));
    element.hidden = false;
    if (target || options.open || remembered(memory)) void open(false).catch(() => {});
    else if (session.findPending()?.failed === false) load().then((panel) => panel.wake(), () => {}); // its answer is to be counted
  });
  return chat;
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
    return sessionStorage.getItem(name);
  } catch {
    return null;
  }
}

/** @param {() => void} run  once the page has loaded and has nothing else to do */
function whenIdle(run) {
  const idle = () => ('requestIdleCallback' in globalThis ? requestIdleCallback(run, { timeout: 4000 }) : setTimeout(run, 200));
  if (document.readyState === 'complete') idle();
  else addEventListener('load', idle, { once: true });
}

/** The options of a script tag. @param {DOMStringMap} data @returns {MountOptions} */
function optionsOf({ agent = '', title, greeting, color, position, theme, lang, dir, texts, open, target, base, userToken }) {
  const found = target ? document.querySelector(target) : null;
  if (target && !found) console.warn(`[chat] data-target: there is no ${target} on this page.`);
  return /** @type {MountOptions} */ ({
    agent, title, greeting, color, position, theme, lang, dir, base, userToken,
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
