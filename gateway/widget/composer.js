/** The box to write in, which grows with its text, and the button beside it: send, or stop while an answer is made. */

import { button, el, icon, rename } from './dom.js';

/** @typedef {ReturnType<typeof createComposer>} Composer */

/** @param {{t: import('./texts/en.js').Texts, submit: () => void, stop: () => void}} options */
export function createComposer({ t, submit, stop }) {
  const box = el('textarea', { rows: '1', placeholder: t.placeholder, 'aria-label': t.message, enterkeyhint: 'send', maxlength: '32000' });
  const arrow = icon('M12 19.5v-15M5.5 11 12 4.5l6.5 6.5');
  const square = icon('M7.5 7.5h9v9h-9z');
  square.classList.add('square');
  const send = button(t.send, 'send', arrow);
  const form = el('form', {}, el('div', { class: 'box' }, box, send));
  let working = false;

  const dress = () => {
    // With `auto`, an empty box would be left to right, and its placeholder too.
    box.dir = box.value ? 'auto' : '';
    send.replaceChildren(working ? square : arrow);
    rename(send, working ? t.stop : t.send);
    send.type = working ? 'button' : 'submit';
    // `disabled` would take the focus away.
    send.setAttribute('aria-disabled', String(!working && !box.value.trim()));
  };
  const grow = () => {
    if (CSS.supports('field-sizing', 'content')) return;
    box.style.height = '0';
    box.style.height = `${box.scrollHeight}px`;
  };

  form.addEventListener('submit', (event) => {
    event.preventDefault();
    submit();
  });
  send.addEventListener('click', (event) => {
    if (!working) return;
    event.preventDefault();
    send.setAttribute('aria-disabled', 'true');
    stop();
  });
  box.addEventListener('input', () => (dress(), grow()));
  box.addEventListener('keydown', (event) => {
    // Shift+Enter makes a new line; while words are being composed (229 in Safari), Enter takes the proposed one.
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    form.requestSubmit();
  });

  return {
    form,
    focus: () => box.focus(),
    /** Show the button that fits. @param {boolean} answering  whether an answer is being made */
    show(answering) {
      working = answering;
      dress();
    },
    /** @returns {string} the text, which is taken out of the box; empty when there is none */
    take() {
      const text = box.value.trim();
      if (!text) return '';
      box.value = '';
      grow();
      return text;
    },
  };
}
