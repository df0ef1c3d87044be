/** Making elements and style sheets without markup: nothing here needs more than the host page's script-src. */

/** @param {string} tag @param {Record<string, string>} attributes @param {...(Node | string)} children  strings become text @returns {HTMLElement} */
export function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** @param {string} label @param {string} className @param {...(Node | string)} children @returns {HTMLButtonElement} named by its text, or by the label */
export function button(label, className, ...children) {
  const named = { type: 'button', class: className, ...(children.length ? { 'aria-label': label, title: label } : {}) };
  return /** @type {HTMLButtonElement} */ (el('button', /** @type {Record<string, string>} */ (named), ...(children.length ? children : [label])));
}

/** @param {string} strokes  an SVG path on a grid of 24 by 24 @returns {SVGElement} */
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

/** A style sheet that works under a strict Content-Security-Policy, unlike a style element. @param {string} rules */
export function sheet(rules) {
  const made = new CSSStyleSheet();
  made.replaceSync(rules);
  return made;
}

/** Black or white, whichever is easier to read on a colour: always 4.5 to 1 or better (WCAG 2.2, 1.4.3). @param {HTMLElement} probe  shows the colour */
export function readableOn(probe) {
  const found = /^rgba?\((\d+), (\d+), (\d+)/.exec(getComputedStyle(probe).backgroundColor);
  if (!found) return '#fff';
  const [red, green, blue] = found.slice(1).map((value) => {
    const part = Number(value) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? '#000' : '#fff';
}
