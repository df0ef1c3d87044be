/**
 * The button that every page view shows: it asks whether the chat may be here, counts unread answers, and loads the chat
 * itself when the visitor wants it.
 */

import { button, el, icon, readableOn, rename, sheet } from './dom.js';
import { AgentError, AgentService } from './service.js';
import { SessionManager } from './session.js';

/** @typedef {import('./widget.js').MountOptions} MountOptions */
/** @typedef {import('./widget.js').Chat} Chat */
/** @typedef {import('./texts/en.js').Texts} Texts */

const ACCENT = '#1f6f54';
const REFUSALS = ['domain_not_allowed', 'agent_not_found', 'agent_inactive', 'channel_not_allowed'];

/**
 * @type {Record<string, () => Promise<{TEXTS: Texts}>>} the languages of the chat, by ISO 639-1 code: a page loads one
 *   of them
 */
const LANGUAGES = {
  ar: () => import('./texts/ar.js'),
  de: () => import('./texts/de.js'),
  en: () => import('./texts/en.js'),
  es: () => import('./texts/es.js'),
  fr: () => import('./texts/fr.js'),
};
const RIGHT_TO_LEFT = /^(ar|fa|he|ur)/i;

// What shows before the chat is opened. The element is fixed and without a size, so it takes no part in the page's layout,
// also where the body is a grid or a flex box.
const STYLE = `
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

/**
 * Put the chat on the page; one that is there already, of this agent at this place, stays as it is.
 * @param {MountOptions} options @returns {Chat}
 */
export function mount(options) {
  const { agent, target } = options;
  if (!agent) throw new TypeError('mount: which agent?');
  const known = mounted.find((one) => one.agent === agent && one.target === target);
  if (known) return known.chat;
  const chat = createLauncher(options, () => (mounted = mounted.filter((one) => one.chat !== chat)));
  mounted.push({ agent, target, chat });
  return chat;
}

/** @param {string} lang @returns {Promise<Texts>} English where the language is not there or cannot be loaded */
async function loadTexts(lang) {
  const load = LANGUAGES[lang.slice(0, 2).toLowerCase()] ?? LANGUAGES.en;
  try {
    return (await load()).TEXTS;
  } catch (error) {
    console.warn('[chat] The words of this language could not be loaded.', error);
    return (await LANGUAGES.en()).TEXTS;
  }
}

/**
 * The chat's element on the page, hidden at first: a shadow root, its colours, and that it outlives the page's body.
 * @param {MountOptions} options @param {string} lang  of the chat: the options' or the page's
 */
function createHost({ target, position = 'right', theme = 'auto', color, lang: wanted, dir }, lang) {
  const around = target ?? document.body;
  const element = document.createElement('div');
  const root = element.attachShadow({ mode: 'open' });
  root.adoptedStyleSheets = [sheet(STYLE)];
  const direction = dir || (wanted ? (RIGHT_TO_LEFT.test(lang) ? 'rtl' : 'ltr') : getComputedStyle(around).direction);
  const frame = el('div', { class: target ? 'inline' : position, dir: direction, ...(lang ? { lang } : {}) });
  const probe = el('i', { class: 'probe' });
  root.append(frame, probe);
  element.hidden = true;
  element.toggleAttribute('data-inline', Boolean(target));
  around.append(element);
  // Turbo and its like go from page to page by putting another body in place.
  const follower = new MutationObserver(() => element.isConnected || target || document.body?.append(element));
  follower.observe(document.documentElement, { childList: true });

  const dark = matchMedia('(prefers-color-scheme: dark)');
  const paint = () => {
    element.dataset.theme = theme === 'auto' ? (dark.matches ? 'dark' : 'light') : theme;
    const accent = color || getComputedStyle(element).getPropertyValue('--chat-accent').trim() || ACCENT;
    element.style.setProperty('--accent', accent);
    element.style.setProperty('--on-accent', readableOn(probe));
  };
  paint();
  dark.addEventListener('change', paint);
  return {
    element,
    root,
    frame,
    remove() {
      follower.disconnect();
      dark.removeEventListener('change', paint);
      element.remove();
    },
  };
}

/** @param {MountOptions} options @param {() => void} removed @returns {Chat} */
function createLauncher(options, removed) {
  const { agent, target, base, userToken } = options;
  const lang = options.lang || (target ?? document.body).closest('[lang]')?.getAttribute('lang') || '';
  const texts = loadTexts(lang).then((found) => ({ ...found, ...options.texts }));
  const session = SessionManager.getInstance(agent);
  const service = new AgentService({ session, userToken, ...(base ? { base } : {}) });
  const { element, root, frame, remove: removeHost } = createHost(options, lang);
  const badge = el('span', { class: 'badge', hidden: '', 'aria-hidden': 'true' });
  const launcher = button(
    '',
    'launcher',
    icon('M12 4c5 0 9 3.3 9 7.5S17 19 12 19c-1 0-2-.1-2.9-.4L4.5 20.5l1-3.6C3.9 15.5 3 13.6 3 11.5 3 7.3 7 4 12 4ZM8 11.5h.01M12 11.5h.01M16 11.5h.01'),
    icon('M6 9.5l6 6 6-6'),
    badge,
  );
  launcher.setAttribute('aria-expanded', 'false');
  if (!target) frame.append(launcher);

  const unread = `gateway_unread:${agent}`;
  /** Answers that came while the chat was closed. @param {Texts} t @param {number} count */
  const showUnread = (t, count) => {
    badge.hidden = !count;
    badge.textContent = count > 9 ? '9+' : String(count);
    rename(launcher, count ? `${t.open}. ${t.unread.replace('{count}', String(count))}` : t.open);
    remember(unread, count ? String(count) : null);
  };
  const unreadSoFar = () => Number(remembered(unread));

  /** @type {Promise<import('./panel.js').Panel> | undefined} */
  let loading;
  const load = () => {
    loading ??= Promise.all([import('./panel.js'), texts]).then(([{ createPanel }, t]) => createPanel({
      ...options, inline: Boolean(target), lang, t, root, frame, launcher, session, service, refused, closed,
      arrived: () => showUnread(t, unreadSoFar() + 1),
    }));
    loading.catch((error) => {
      // The next click tries again.
      loading = undefined;
      console.warn('[chat] The chat could not be loaded.', error);
    });
    return loading;
  };

  const memory = `gateway_open:${agent}`;
  // A chat that was closed again while it loaded is not shown.
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
      showUnread(await texts, 0);
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
    removed();
    loading?.then((panel) => panel.remove()).catch(() => {});
    removeHost();
  };
  // While it loads, a second click is impatience.
  launcher.addEventListener('click', () => (launcher.getAttribute('aria-expanded') === 'true' ? close() : void open(true).catch(() => {})));
  for (const hint of ['pointerenter', 'focus']) launcher.addEventListener(hint, () => void load().catch(() => {}), { once: true });

  /**
   * Where the chat may not be here, take it away and tell the site's owner why.
   * @param {unknown} error @returns {boolean} whether it was so
   */
  const refused = (error) => {
    if (!(error instanceof AgentError) || !REFUSALS.includes(error.code)) return false;
    const why = error.code === 'domain_not_allowed' ? `its allowed_domains do not contain ${location.hostname}` : error.title;
    console.error(`[chat] No chat with the agent "${agent}" on this site: ${why} (${error.code}).`);
    remove();
    return true;
  };
  /** @param {[boolean, Texts]} found */
  const appear = ([welcome, t]) => {
    if (!welcome) return;
    showUnread(t, unreadSoFar());
    element.hidden = false;
    if (target || options.open || remembered(memory)) void open(false).catch(() => {});
    // Its answer is to be counted.
    else if (session.findPending()?.failed === false) load().then((panel) => panel.wake(), () => {});
  };
  // No connection just now is no reason to hide the chat.
  const allowed = service.check(agent).then(() => true, (error) => !refused(error));
  Promise.all([allowed, texts]).then(appear).catch((error) => console.warn('[chat] The chat could not be loaded.', error));
  return { element, open: () => open(true), close, remove, setUserToken: (token) => service.setUserToken(token) };
}

/**
 * Keep a value for this tab, so that the chat stays open from page to page.
 * @param {string} name @param {string | null} value
 */
function remember(name, value) {
  try {
    if (value === null) sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, value);
  } catch {
    // Storage is blocked.
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
