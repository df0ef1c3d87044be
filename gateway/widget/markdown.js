/**
 * Renders answers as a safe subset of Markdown, while they grow.
 *
 * The parser (streaming-markdown) calls back with elements and text; elements are made here, from a fixed list, and all
 * else becomes text nodes. No HTML is ever parsed, so there is none to sanitize: a tag is shown as it is written. An image
 * becomes a link, because loading it would tell a third party about the visitor.
 *
 * Rendered elements are never made again. A long text is taken in slices, so that the page stays responsive. An answer with
 * marks that span pages, or with thousands of elements, is shown as plain text.
 */

import * as md from './vendor/streaming-markdown.js';

/** @typedef {{node: HTMLElement, token: number, start: string, href?: string}} Open  an element that still grows */

const SLICE_CHARS = 2000;
const SLICE_MS = 12;
// The parser has room for 24 levels.
const DEEPEST = 16;
// The parser scans an unfinished mark again with each character.
const LONGEST_MARK = 4000;
// More of them would make each layout hold up the page.
const MOST_ELEMENTS = 8000;
const MOST_COLUMNS = 50;
const PLAIN_BLOCK = 4000;
/** @type {number[]} tokens whose text may be shown before the parser is sure of the newest character */
const FLOWING = [md.PARAGRAPH, md.HEADING_1, md.HEADING_2, md.HEADING_3, md.HEADING_4, md.HEADING_5, md.HEADING_6, md.ITALIC_AST, md.ITALIC_UND,
  md.STRONG_AST, md.STRONG_UND, md.STRIKE, md.LIST_ITEM, md.TABLE_CELL, md.BLOCKQUOTE];

/** @type {Record<number, string>} */
const TAGS = {
  [md.PARAGRAPH]: 'p',
  // Below the heading of the chat.
  [md.HEADING_1]: 'h3',
  [md.HEADING_2]: 'h4',
  [md.HEADING_3]: 'h5',
  [md.HEADING_4]: 'h6',
  [md.HEADING_5]: 'h6',
  [md.HEADING_6]: 'h6',
  [md.CODE_BLOCK]: 'pre',
  [md.CODE_FENCE]: 'pre',
  [md.CODE_INLINE]: 'code',
  [md.EQUATION_BLOCK]: 'pre',
  [md.EQUATION_INLINE]: 'code',
  [md.ITALIC_AST]: 'em',
  [md.ITALIC_UND]: 'em',
  [md.STRONG_AST]: 'strong',
  [md.STRONG_UND]: 'strong',
  [md.STRIKE]: 's',
  [md.LINK]: 'a',
  [md.RAW_URL]: 'a',
  [md.IMAGE]: 'a',
  [md.BLOCKQUOTE]: 'blockquote',
  [md.LINE_BREAK]: 'br',
  [md.RULE]: 'hr',
  [md.LIST_UNORDERED]: 'ul',
  [md.LIST_ORDERED]: 'ol',
  [md.LIST_ITEM]: 'li',
  [md.CHECKBOX]: 'span',
  [md.TABLE]: 'table',
  [md.TABLE_ROW]: 'tr',
  [md.TABLE_CELL]: 'td',
};
/** @type {number[]} */
const LINKS = [md.LINK, md.RAW_URL, md.IMAGE];
/** @type {number[]} */
const WIDE = [md.CODE_BLOCK, md.CODE_FENCE, md.EQUATION_BLOCK, md.TABLE];

/** @param {string} href @returns {string | null} the address, if a link may lead there */
export function safeAddress(href) {
  try {
    // The address may be followed by a title.
    const url = new URL(href.trim().replace(/\s+["'(].*$/s, ''));
    return ['http:', 'https:', 'mailto:'].includes(url.protocol) ? url.href : null;
  } catch {
    // A relative address: a model does not know the host page's.
    return null;
  }
}

/** One answer on the page, which may still grow. */
export class MarkdownView {
  #root;
  #text = '';
  #written = 0;
  /** @type {md.Parser} */
  #parser;
  /** @type {Open[]} */
  #open = [];
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  #whole = false;
  // Text to be added in one piece: adding to a long text bit by bit would be slow.
  #pending = '';
  #last = '';
  // Shows the characters that the parser still holds back.
  #tail = document.createTextNode('');
  #plain = false;
  #elements = 0;
  #columns = 0;

  /** @param {HTMLElement} root  shows the answer */
  constructor(root) {
    this.#root = root;
    this.#parser = this.#begin();
  }

  /** Show this text; `whole` when nothing follows. @param {string} text @param {boolean} [whole] */
  show(text, whole = false) {
    if (this.#whole || !text.startsWith(this.#text)) this.#parser = this.#begin();
    this.#text = text;
    this.#whole = whole;
    this.#slice();
  }

  #begin() {
    this.#root.replaceChildren();
    this.#pending = this.#last = '';
    this.#plain = false;
    this.#elements = this.#columns = 0;
    this.#open = [{ node: this.#root, token: md.DOCUMENT, start: '' }];
    this.#written = 0;
    return md.parser({
      data: undefined,
      add_token: (_, token) => this.#start(token),
      end_token: () => this.#end(),
      add_text: (_, text) => this.#add(text),
      set_attr: (_, kind, value) => this.#set(kind, value),
    });
  }

  #slice() {
    clearTimeout(this.#timer);
    const began = performance.now();
    this.#tail.remove();
    while (this.#written < this.#text.length) {
      if (performance.now() - began > SLICE_MS) {
        this.#flush();
        this.#timer = setTimeout(() => this.#slice(), 0);
        return;
      }
      const part = this.#text.slice(this.#written, this.#written + SLICE_CHARS);
      this.#written += part.length;
      this.#write(part);
    }
    if (this.#plain) return;
    if (this.#whole) {
      md.parser_end(this.#parser);
      const { pending } = this.#parser;
      if (/^(\]\(|<)/.test(pending)) this.#add(pending.trimEnd());
      for (const { node, token, href } of this.#open) {
        // This link never ended.
        if (token === md.LINK && href === undefined) node.prepend('[');
      }
    }
    this.#flush();
    if (!this.#whole) this.#showTail();
  }

  /** Show the characters that the parser holds back, where they will be text; the next slice takes them away again. */
  #showTail() {
    const { pending, token } = this.#parser;
    if (!/^[\p{L}\p{N}\p{P}\p{S}]{1,8}$/u.test(pending) || /^[\\<`_*~$[\]!|#>+-]/.test(pending) || !FLOWING.includes(this.#top.token)) return;
    // They may become the mark of a list.
    if (token === md.LINE_BREAK) return;
    this.#tail.data = pending;
    this.#top.node.append(this.#tail);
  }

  /** Show the whole text as it was written. */
  #giveUp() {
    this.#begin();
    this.#plain = true;
    this.#written = this.#text.length;
    this.#addPlain(this.#text);
  }

  /** In blocks, so that earlier text is not laid out again. @param {string} text */
  #addPlain(text) {
    let block = this.#root.lastElementChild;
    for (let at = 0; at < text.length; ) {
      let room = PLAIN_BLOCK - (block?.textContent ?? '').length;
      if (!block || room <= 0) {
        block = document.createElement('p');
        block.className = 'plain';
        this.#root.append(block);
        room = PLAIN_BLOCK;
      }
      block.append(text.slice(at, at + room));
      at += room;
    }
  }

  /** @param {string} part */
  #write(part) {
    if (this.#plain) return this.#addPlain(part);
    for (const [line] of part.matchAll(/[^\n]*\n?/g)) {
      // A few characters at a time cannot exceed the parser's levels; deeper nesting is shown as plain text.
      for (let at = 0; at < line.length; at += DEEPEST / 2) {
        const bit = line.slice(at, at + DEEPEST / 2);
        if (this.#parser.len >= DEEPEST) this.#add(bit);
        else md.parser_write(this.#parser, bit);
        if (this.#parser.pending.length > LONGEST_MARK || this.#elements > MOST_ELEMENTS || this.#columns > MOST_COLUMNS) return this.#giveUp();
      }
    }
  }

  get #top() {
    return this.#open[this.#open.length - 1];
  }

  /** @param {number} token */
  #start(token) {
    this.#flush();
    const { node: parent } = this.#top;
    this.#elements += 1;
    if (token === md.TABLE_CELL) this.#columns = parent.childElementCount + 1;
    let node = document.createElement(TAGS[token] ?? 'span');
    let start = '';
    let inner = node;
    if (token === md.ITALIC_UND && /[\p{L}\p{N}]/u.test(this.#last)) {
      // The underscore of snake_case is no emphasis.
      node = inner = document.createElement('span');
      node.append((start = '_'));
    }
    if (token === md.IMAGE) node.append('🖼 ');
    if (WIDE.includes(token)) {
      // It scrolls by itself, by keyboard too.
      const outer = document.createElement('div');
      outer.className = token === md.TABLE ? 'wide' : 'wide code';
      outer.tabIndex = 0;
      outer.append(node);
      node = outer;
    }
    if (token === md.TABLE_CELL && parent.parentElement?.firstChild === parent) node = inner = document.createElement('th');
    this.#last = '';
    parent.append(node);
    this.#open.push({ node: inner, token, start });
  }

  #end() {
    this.#flush();
    const { node, token, start, href } = this.#top;
    this.#open.pop();
    if (start && this.#parser.pending[0] === '_') node.append('_');
    this.#last = '';
    if (!LINKS.includes(token) || href) return;
    // No link after all, or one to a forbidden address: show its text in a plain element.
    const plain = document.createElement('span');
    if (token !== md.RAW_URL && href === undefined) node.prepend('[');
    if (token !== md.RAW_URL && href === undefined && this.#parser.pending[0] === ']') node.append(']');
    plain.append(...node.childNodes);
    node.replaceWith(plain);
  }

  /** @param {string} text */
  #add(text) {
    this.#pending += text;
    this.#last = text.slice(-1);
  }

  #flush() {
    if (!this.#pending) return;
    const { node } = this.#top;
    if (node.lastChild instanceof Text) node.lastChild.appendData(this.#pending);
    else node.append(this.#pending);
    this.#pending = '';
  }

  /** @param {number} kind @param {string} value */
  #set(kind, value) {
    const open = this.#top;
    if (kind === md.HREF || kind === md.SRC) {
      const href = safeAddress(open.token === md.RAW_URL ? value.replace(/[.,;:!?)\]}'"*]+$/, '') : value);
      open.href = href ?? '';
      if (!href) return;
      /** @type {any} an HTMLAnchorElement */
      const link = open.node;
      link.href = href;
      link.target = '_blank';
      link.rel = 'noopener noreferrer';
    } else if (kind === md.START) {
      open.node.setAttribute('start', String(Number.parseInt(value, 10) || 1));
    } else if (kind === md.CHECKED) {
      open.node.textContent = '☑';
    }
  }
}
