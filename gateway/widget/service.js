/**
 * The gateway's HTTP calls: messages, streams that resume by themselves, history. The chat uses them, and so do sites with an
 * interface of their own.
 *
 * Every failure is an AgentError. A message keeps its message_id over all attempts, so the gateway never answers it twice;
 * a session that ended or was lost is replaced by a new one on the way.
 */

import { SessionManager, randomHex } from './session.js';

/**
 * @typedef {{id: string, role: string, content: string, seq: number, turn_id: string, created_at: string,
 *   message_id?: string}} Message
 */
/** @typedef {{messages: Message[], next_before: number | null}} History  messages, oldest first */
/** @typedef {{response: string, metadata: Record<string, any>}} Answer */
/**
 * @typedef {{type: 'turn.started', turn_id: string, session_id: string, message?: string, message_id?: string} | {type: 'text.delta', text: string}
 *   | {type: 'custom', [name: string]: any} | {type: 'turn.completed', response: string, metadata: Record<string, any>}
 *   | {type: 'turn.failed', code: string, title: string, retryable: boolean} | {type: 'turn.cancelled'}
 *   | {type: 'log.reset'} | {type: 'session.replaced'} | {type: 'feed.opened'}
 *   | {type: 'connection.lost', wait_s: number} | {type: 'connection.restored'}} TurnEvent
 */

const CALL_TIMEOUT_MS = 15_000;
// Longer than a turn may wait and run at the gateway, so that the gateway's own error comes first.
const SEND_TIMEOUT_MS = 300_000;
// The gateway sends a heartbeat every 15 s.
const SILENCE_MS = 40_000;
const ATTEMPTS = 8;
const LONGEST_WAIT_S = 20;
// A longer Retry-After is an error for the visitor to see.
const LONGEST_ASKED_S = 120;
const TERMINAL = ['turn.completed', 'turn.failed', 'turn.cancelled'];
// Codes of problems that pass by themselves: the same message is sent again without asking the visitor.
const PASSING = ['unreachable', 'turn_lost', 'turn_in_progress', 'turn_superseded', 'queue_full', 'rate_limited', 'agent_busy',
  'too_many_streams'];

/** What the gateway answered instead of a result (RFC 9457), or `unreachable` when there was no answer at all. */
export class AgentError extends Error {
  /**
   * @param {{code: string, title: string, status?: number, retryAfter?: number | null, retryable?: boolean}} problem
   *   retryAfter in seconds
   */
  constructor({ code, title, status = 0, retryAfter = null, retryable = false }) {
    super(title);
    this.name = 'AgentError';
    this.code = code;
    this.title = title;
    this.status = status;
    this.retryAfter = retryAfter;
    this.retryable = retryable;
  }

  /** Whether to try again without asking. */
  get passes() {
    return PASSING.includes(this.code) || [502, 503, 504].includes(this.status) && !this.code.startsWith('graph') && this.code !== 'turn_timeout';
  }
}

const unreachable = () => new AgentError({ code: 'unreachable', title: 'No connection to the chat.', retryable: true });

/** Exponential backoff with full jitter. @param {number} attempt  from 0 @returns {number} seconds */
const backoff = (attempt) => 0.2 + Math.random() * Math.min(LONGEST_WAIT_S, 0.5 * 2 ** attempt);

/** Not before Retry-After, with jitter. @param {unknown} error @param {number} attempt @returns {number} seconds */
const waitFor = (error, attempt) => Math.max(error instanceof AgentError ? error.retryAfter ?? 0 : 0, backoff(attempt));

/** @param {AgentError} problem */
const tooLong = (problem) => (problem.retryAfter ?? 0) > LONGEST_ASKED_S;

const offline = () => globalThis.navigator?.onLine === false;

/**
 * Wait, at most until the browser is online again.
 * @param {number} seconds @param {AbortSignal} [signal] @returns {Promise<void>}
 */
const pause = (seconds, signal) =>
  new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      globalThis.removeEventListener?.('online', done);
      signal?.removeEventListener('abort', abort);
    };
    const done = () => (stop(), resolve());
    const abort = () => (stop(), reject(signal?.reason));
    const timer = setTimeout(done, (offline() ? 30 : seconds) * 1000);
    globalThis.addEventListener?.('online', done);
    signal?.addEventListener('abort', abort);
    if (signal?.aborted) abort();
  });

/**
 * Server-Sent Events (WHATWG HTML, section 9.2) of a response.
 * @param {Response} response @param {{id: string}} cursor  kept up to date @returns {AsyncGenerator<TurnEvent, void, void>}
 */
async function* readEvents(response, cursor) {
  /** @type {any} */
  const { body } = response;
  /** @type {ReadableStreamDefaultReader<string>} */
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  /** @type {any} */
  let timer;
  let rest = '';
  try {
    for (;;) {
      /** @type {Promise<never>} */
      const silence = new Promise((_, reject) => (timer = setTimeout(() => reject(unreachable()), SILENCE_MS)));
      const { done, value } = await Promise.race([reader.read(), silence]);
      clearTimeout(timer);
      if (done) return;
      const blocks = (rest + value).split('\n\n');
      rest = blocks.pop() ?? '';
      for (const block of blocks) {
        /** @type {Record<string, string>} */
        const field = {};
        for (const line of block.split('\n')) {
          const colon = line.indexOf(': ');
          if (colon > 0) field[line.slice(0, colon)] = line.slice(colon + 2);
        }
        if (field.id) cursor.id = field.id;
        if (field.event) yield { ...JSON.parse(field.data ?? '{}'), type: field.event };
      }
    }
  } finally {
    clearTimeout(timer);
    reader.cancel().catch(() => {});
  }
}

/**
 * @typedef {string | (() => string | null | Promise<string | null>) | null} UserToken  what the site signed for a user
 *   who is logged in, or what fetches it
 */

export class AgentService {
  #base;
  #session;
  #userToken;

  /** @param {{base?: string, session?: SessionManager, userToken?: UserToken}} [options]  base: the gateway's address */
  constructor({ base = new URL('../../', import.meta.url).href, session = SessionManager.getInstance(), userToken = null } = {}) {
    this.#base = base.replace(/\/+$/, '');
    this.#session = session;
    this.#userToken = userToken;
  }

  /** Who the visitor is from now on; null: nobody that the site knows. @param {UserToken} userToken */
  setUserToken(userToken) {
    this.#userToken = userToken;
  }

  /**
   * Send one message and wait for the answer. To send it again after an error, pass the same messageId.
   * @param {string} agentId @param {string} message @param {{messageId?: string, signal?: AbortSignal}} [options]
   * @returns {Promise<Answer>}
   */
  async sendMessage(agentId, message, { messageId = randomHex(16), signal } = {}) {
    for (let attempt = 0, replaced = 0; ; attempt += 1) {
      const sessionId = this.#session.getSessionId();
      try {
        return await this.#json('POST', `/api/chat/${encodeURIComponent(agentId)}/message`, this.#body(message, messageId), signal, SEND_TIMEOUT_MS);
      } catch (error) {
        if (await this.#replace(agentId, error, sessionId, replaced)) replaced += 1;
        else if (!(error instanceof AgentError) || !error.passes || attempt >= ATTEMPTS || tooLong(error)) throw error;
        else await pause(waitFor(error, attempt), signal);
      }
    }
  }

  /**
   * Send one message; its events as they come, the last one `turn.completed`, `turn.failed` or `turn.cancelled`.
   * A cut stream is resumed, a lost turn is started again (`log.reset`: forget the text so far), a lost session is replaced.
   * @param {string} agentId @param {string} message @param {{messageId?: string, signal?: AbortSignal}} [options]
   * @returns {AsyncGenerator<TurnEvent, void, void>}
   */
  async *streamMessage(agentId, message, { messageId = randomHex(16), signal } = {}) {
    const chat = `/api/chat/${encodeURIComponent(agentId)}`;
    const cursor = { id: '' };
    let turnId = '';
    let lost = false;
    for (let failures = 0, replaced = 0; ; ) {
      const sessionId = this.#session.getSessionId();
      try {
        const response = turnId
          ? await this.#fetch('GET', `${chat}/turns/${turnId}/stream?session_id=${encodeURIComponent(sessionId)}`, { signal, cursor: cursor.id })
          : await this.#fetch('POST', `${chat}/stream`, { body: this.#body(message, messageId), signal });
        for await (const event of readEvents(response, cursor)) {
          failures = 0;
          if (lost) yield { type: 'connection.restored' };
          lost = false;
          if (event.type === 'turn.started') turnId = event.turn_id;
          if (event.type === 'turn.failed' && PASSING.includes(event.code)) throw new AgentError(event);
          yield event;
          if (TERMINAL.includes(event.type)) return;
        }
        // Cut before the terminal event: resume.
        throw unreachable();
      } catch (error) {
        if (signal?.aborted) throw error;
        const problem = error instanceof AgentError ? error : unreachable();
        if (await this.#replace(agentId, problem, sessionId, replaced)) {
          replaced += 1;
          yield { type: 'session.replaced' };
        } else if (problem.code === 'unreachable' || problem.passes || (turnId && problem.status === 404)) {
          if (tooLong(problem) || (!offline() && (failures += 1) > ATTEMPTS)) throw problem;
          // The turn is gone: the same message is sent again, and the gateway knows whether it was answered.
          if (turnId && (problem.code !== 'unreachable' && problem.status !== 503)) turnId = cursor.id = '';
          const wait_s = waitFor(problem, failures);
          lost = true;
          yield { type: 'connection.lost', wait_s };
          await pause(wait_s, signal);
          if (!turnId) yield { type: 'log.reset' };
          continue;
        } else throw problem;
        turnId = cursor.id = '';
        yield { type: 'log.reset' };
      }
    }
  }

  /**
   * The session's turns as they happen, whoever started them, until the signal or the session's end. `feed.opened` comes
   * first and after each reconnection: the history is to be read then.
   * @param {{signal?: AbortSignal}} [options] @returns {AsyncGenerator<TurnEvent, void, void>}
   */
  async *watch({ signal } = {}) {
    const cursor = { id: '' };
    const sessionId = this.#session.findSessionId();
    for (let failures = 0; sessionId; ) {
      /** @type {unknown} */
      let failed;
      try {
        const response = await this.#fetch('GET', `/api/sessions/${encodeURIComponent(sessionId)}/events`, { signal, cursor: cursor.id });
        failures = 0;
        yield { type: 'feed.opened' };
        yield* readEvents(response, cursor);
      } catch (error) {
        if (signal?.aborted) return;
        if (error instanceof AgentError && error.status >= 400 && !error.passes) return;
        failed = error;
        failures += 1;
      }
      const wait_s = waitFor(failed, failures);
      if (failures) yield { type: 'connection.lost', wait_s };
      await pause(wait_s, signal).catch(() => {});
      if (signal?.aborted) return;
    }
  }

  /** Stop the answer that is being made; false when there was none. @param {string} agentId @returns {Promise<boolean>} */
  async cancel(agentId) {
    const sessionId = this.#session.findSessionId();
    if (!sessionId) return false;
    try {
      await this.#json('POST', `/api/chat/${encodeURIComponent(agentId)}/cancel`, { session_id: sessionId });
      return true;
    } catch (error) {
      if (error instanceof AgentError && (error.code === 'no_turn_running' || error.status === 404)) return false;
      throw error;
    }
  }

  /**
   * The newest messages of the session, or those before a cursor. A session without messages yet is empty, not an error.
   * @param {{before?: number | null, limit?: number}} [options]  before: `next_before` of the page after it
   * @returns {Promise<History>}
   */
  async history({ before = null, limit = 50 } = {}) {
    const sessionId = this.#session.findSessionId();
    const empty = { messages: [], next_before: null };
    if (!sessionId) return empty;
    const query = `limit=${limit}${before === null ? '' : `&before=${before}`}`;
    try {
      return await this.#json('GET', `/api/sessions/${encodeURIComponent(sessionId)}/messages?${query}`);
    } catch (error) {
      if (error instanceof AgentError && [401, 404, 410].includes(error.status)) return empty;
      throw error;
    }
  }

  /** End the session, at the gateway and here. Harmless where there is none. */
  async endSession() {
    const sessionId = this.#session.findSessionId();
    if (!sessionId) return;
    try {
      await this.#json('POST', `/api/sessions/${encodeURIComponent(sessionId)}/end`);
    } catch (error) {
      if (!(error instanceof AgentError) || ![401, 404, 410].includes(error.status)) throw error;
    }
    if (this.#session.findSessionId() === sessionId) this.#session.clearSession();
  }

  /** Whether this website may use the agent. Raises the AgentError that says why not. @param {string} agentId */
  async check(agentId) {
    const domain = this.#session.getSessionMetadata().website_domain;
    await this.#json('GET', `/api/chat/${encodeURIComponent(agentId)}?website_domain=${encodeURIComponent(domain)}`);
  }

  /**
   * Where an error says that the session is over or is not this visitor's, begin another: with an id made here, or, for an
   * agent with `require_token`, with one that the gateway mints.
   * @param {string} agentId @param {unknown} error @param {string} sessionId @param {number} replaced  how often already
   * @returns {Promise<boolean>}
   */
  async #replace(agentId, error, sessionId, replaced) {
    if (!(error instanceof AgentError) || replaced > 1) return false;
    const over = error.status === 410 || error.code === 'session_not_found' || error.code.startsWith('session_token');
    if (!over) return false;
    // Another tab may have begun the next session already, which is then joined.
    if (this.#session.findSessionId() === sessionId) this.#session.clearSession();
    if (replaced === 1 || error.code === 'session_token_required') {
      const metadata = this.#session.getSessionMetadata();
      const opened = await this.#json('POST', '/api/sessions', { agent_id: agentId, metadata });
      this.#session.setSession(opened.session_id, opened.session_token);
    }
    return true;
  }

  /** @param {string} message @param {string} messageId */
  #body(message, messageId) {
    return {
      message,
      session_id: this.#session.getSessionId(),
      message_id: messageId,
      metadata: this.#session.getSessionMetadata(),
    };
  }

  /**
   * @param {string} method @param {string} path @param {object} [body] @param {AbortSignal} [signal]
   * @param {number} [timeoutMs] @returns {Promise<any>}
   */
  async #json(method, path, body, signal, timeoutMs = CALL_TIMEOUT_MS) {
    const stop = new AbortController();
    const abort = () => stop.abort();
    const timer = setTimeout(abort, timeoutMs);
    signal?.addEventListener('abort', abort);
    if (signal?.aborted) abort();
    try {
      const response = await this.#fetch(method, path, { body, signal: stop.signal });
      return await response.json();
    } catch (error) {
      if (signal?.aborted || error instanceof AgentError) throw error;
      throw unreachable();
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener('abort', abort);
    }
  }

  /**
   * @param {string} method @param {string} path @param {{body?: object, signal?: AbortSignal, cursor?: string}} options
   * @returns {Promise<Response>} a good one
   */
  async #fetch(method, path, { body, signal, cursor }) {
    /** @type {Record<string, string>} */
    const headers = {};
    const token = this.#session.findToken();
    if (body) headers['Content-Type'] = 'application/json';
    if (cursor) headers['Last-Event-ID'] = cursor;
    if (token) headers.Authorization = `Bearer ${token}`;
    let response;
    try {
      // Fetched for each call: the site knows when a token has expired.
      const userToken = typeof this.#userToken === 'function' ? await this.#userToken() : this.#userToken;
      if (userToken) headers['X-User-Token'] = userToken;
      response = await fetch(this.#base + path, { method, headers, body: body && JSON.stringify(body), signal, credentials: 'omit' });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw unreachable();
    }
    if (response.ok) return response;
    // A proxy's error page is no JSON.
    const problem = await response.json().catch(() => null);
    const seconds = Number(problem?.retry_after ?? response.headers.get('Retry-After') ?? NaN);
    throw new AgentError({
      code: problem?.code ?? 'bad_answer',
      title: problem?.title ?? 'The chat did not answer as expected.',
      status: response.status,
      retryAfter: Number.isFinite(seconds) ? seconds : null,
      retryable: problem?.retryable ?? response.status >= 500,
    });
  }
}
