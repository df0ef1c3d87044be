/** Making elements and style sheets without markup, so that a page needs nothing but its script-src. */

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag @param {Record<string, string>} attributes @param {...(Node | string)} children  strings become text
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/**
 * A button, named by its text or else by the label.
 * @param {string} label @param {string} className @param {...(Node | string)} children
 */
export function button(label, className, ...children) {
  const made = el('button', { type: 'button', class: className }, ...(children.length ? children : [label]));
  if (children.length) rename(made, label);
  return made;
}

/** Give a button another accessible name and the same tooltip. @param {HTMLButtonElement} button @param {string} label */
export function rename(button, label) {
  button.setAttribute('aria-label', label);
  button.title = label;
}

/** @param {string} strokes  an SVG path on a grid of 24 by 24 */
export function icon(strokes) {
  const namespace = 'http://www.w3.org/2000/svg';
  const svg = document.createElementNS(namespace, 'svg');
  const path = document.createElementNS(namespace, 'path');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  path.setAttribute('d', strokes);
  svg.append(path);
  return svg;
}

/**
 * A style sheet for `adoptedStyleSheets`: unlike a style element, it works under a strict Content-Security-Policy.
 * @param {string} rules
 */
export function sheet(rules) {
  const made = new CSSStyleSheet();
  made.replaceSync(rules);
  return made;
}

/**
 * Black or white, whichever contrasts more with a colour: always 4.5 to 1 or better (WCAG 2.2, 1.4.3).
 * @param {HTMLElement} probe  has that background
 */
export function readableOn(probe) {
  const found = /^rgba?\((\d+), (\d+), (\d+)/.exec(getComputedStyle(probe).backgroundColor);
  if (!found) return '#fff';
  const [red, green, blue] = found.slice(1).map((value) => {
    const part = Number(value) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? '#000' : '#fff';
}
