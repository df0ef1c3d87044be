// The search field, copy buttons, this gateway's own address in the examples, and the mark in the menu.

const EXAMPLE_BASE = 'http://127.0.0.1:8000';
const base = new URL('.', location.href).href.replace(/\/$/, '');

const wanted = /** @type {HTMLInputElement} */ (document.getElementById('wanted'));
const found = /** @type {HTMLElement} */ (document.getElementById('found'));
const calls = /** @type {HTMLElement[]} */ ([...document.querySelectorAll('[data-call]')]);
const groups = /** @type {HTMLElement[]} */ ([...document.querySelectorAll('[data-group]')]);

wanted.addEventListener('input', () => {
  const words = wanted.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const call of calls) call.hidden = !words.every((word) => call.dataset.call?.includes(word));
  for (const group of groups) group.hidden = !group.querySelector('[data-call]:not([hidden])');
  const count = document.querySelectorAll('article[data-call]:not([hidden])').length;
  found.textContent = words.length ? `${count} ${count === 1 ? 'call' : 'calls'}` : '';
});

for (const code of document.querySelectorAll('[data-copy]')) {
  const text = /** @type {HTMLElement} */ (code.querySelector('pre'));
  text.textContent = (text.textContent ?? '').replaceAll(EXAMPLE_BASE, base);
  const button = document.createElement('button');
  button.textContent = 'Copy';
  button.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(text.textContent ?? '');
      button.textContent = 'Copied';
    } catch {
      // Without TLS, browsers give no clipboard: the text is selected instead.
      getSelection()?.selectAllChildren(text);
      button.textContent = 'Selected';
    }
    setTimeout(() => (button.textContent = 'Copy'), 2000);
  });
  code.append(button);
}

const links = new Map([...document.querySelectorAll('nav a')].map((link) => [link.getAttribute('href'), link]));
const seen = new IntersectionObserver(
  (entries) => {
    const entry = entries.findLast((one) => one.isIntersecting);
    if (!entry) return;
    for (const link of links.values()) link.removeAttribute('aria-current');
    links.get(`#${entry.target.id}`)?.setAttribute('aria-current', 'location');
  },
  { rootMargin: '-5% 0% -85% 0%' },
);
for (const article of document.querySelectorAll('article[id], section > h2[id]')) seen.observe(article);
