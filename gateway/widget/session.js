/**
 * The visitor's session: its id, its token, and the message that waits for its answer. In localStorage, read anew each time,
 * because other tabs write there too; in memory where storage is blocked or there is no window.
 */

/**
 * @typedef {{sessionId: string, messageId: string, text: string, failed?: boolean}} Pending  a message that waits for
 *   its answer
 */

const ID = /^[A-Za-z0-9_.:-]{16,255}$/;

/** @param {number} bytes @returns {string} random bytes as hex; works on plain http too, unlike randomUUID */
export const randomHex = (bytes) =>
  Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (byte) => byte.toString(16).padStart(2, '0')).join('');

export class SessionManager {
  /** @type {Map<string, SessionManager>} */
  static #instances = new Map();
  #key;
  /** @type {Map<string, string>} values that could not be stored */
  #memory = new Map();

  /** @param {string} key  the name in localStorage */
  constructor(key) {
    this.#key = key;
  }

  /**
   * One per agent, because the gateway binds a session to its agent. Without a window, as on a server with its many
   * visitors, each call makes a new one. @param {string} [agentId] @returns {SessionManager}
   */
  static getInstance(agentId = '') {
    const key = agentId ? `gateway_session:${agentId}` : 'gateway_session';
    if (!globalThis.document) return new SessionManager(key);
    let found = SessionManager.#instances.get(key);
    if (!found) SessionManager.#instances.set(key, (found = new SessionManager(key)));
    return found;
  }

  /** @returns {string | null} the id if this visitor has one; makes none */
  findSessionId() {
    const found = this.#read('');
    return found !== null && ID.test(found) ? found : null;
  }

  /** @returns {string} the id, made on first use: 128 random bits, for it is the session's secret */
  getSessionId() {
    const found = this.findSessionId();
    if (found) return found;
    const made = `session_${Date.now()}_${randomHex(16)}`;
    this.#write('', made);
    return made;
  }

  /** Take a session that the gateway minted. @param {string} sessionId @param {string} token */
  setSession(sessionId, token) {
    this.#write('', sessionId);
    this.#write(':token', `${sessionId} ${token}`);
  }

  /** @returns {string | null} the token of the session, if it has one */
  findToken() {
    const [sessionId, token] = (this.#read(':token') ?? '').split(' ');
    return token && sessionId === this.findSessionId() ? token : null;
  }

  /** Forget the session: the next message begins a new one. */
  clearSession() {
    for (const part of ['', ':token', ':pending']) this.#write(part, null);
  }

  /** @returns {{website_domain: string, user_agent: string, timestamp: string}} */
  getSessionMetadata() {
    return {
      website_domain: globalThis.location?.hostname ?? '',
      user_agent: globalThis.navigator?.userAgent ?? '',
      timestamp: new Date().toISOString(),
    };
  }

  /** @returns {Pending | null} the message of this session that waits for its answer */
  findPending() {
    try {
      const found = JSON.parse(this.#read(':pending') ?? 'null');
      return found?.sessionId === this.findSessionId() && typeof found?.text === 'string' ? found : null;
    } catch {
      return null;
    }
  }

  /** @param {Pending | null} pending */
  keepPending(pending) {
    this.#write(':pending', pending && JSON.stringify(pending));
  }

  /** Be told when another tab began a session or sent a message. @param {() => void} tell @returns {() => void} to stop */
  onChange(tell) {
    /** @param {StorageEvent} event */
    const listener = ({ key }) => {
      if (key === null || key === this.#key || key === `${this.#key}:pending`) tell();
    };
    globalThis.addEventListener?.('storage', listener);
    return () => globalThis.removeEventListener?.('storage', listener);
  }

  /** @param {string} part @returns {string | null} */
  #read(part) {
    try {
      return localStorage.getItem(this.#key + part) ?? this.#memory.get(part) ?? null;
    } catch {
      return this.#memory.get(part) ?? null;
    }
  }

  /** @param {string} part @param {string | null} value */
  #write(part, value) {
    this.#memory.delete(part);
    try {
      if (value === null) localStorage.removeItem(this.#key + part);
      else localStorage.setItem(this.#key + part, value);
    } catch {
      if (value === null) return;
      this.#memory.set(part, value);
      try {
        // Storage is full: the former value must not be read again.
        localStorage.removeItem(this.#key + part);
      } catch {
        // Storage is blocked.
      }
    }
  }
}
