/** The chat widget of the session gateway, and the client for sites with an interface of their own. */

/** The words of the chat; `{seconds}` in `wait` and `{count}` in `unread` are replaced. */
export interface Texts {
  title: string;
  greeting: string;
  open: string;
  close: string;
  unread: string;
  conversation: string;
  placeholder: string;
  message: string;
  send: string;
  stop: string;
  you: string;
  agent: string;
  sending: string;
  stopped: string;
  again: string;
  againQuestion: string;
  againYes: string;
  againNo: string;
  ended: string;
  earlier: string;
  notLoaded: string;
  retry: string;
  latest: string;
  offline: string;
  reconnecting: string;
  wait: string;
  failed: string;
  unreachable: string;
  rate_limited: string;
  turn_timeout: string;
  agent_busy: string;
  quota_exhausted: string;
  too_many_streams: string;
  identity_required: string;
  user_token_invalid: string;
}

export interface MountOptions {
  /** Its name or id. */
  agent: string;
  /** Over the conversation. */
  title?: string;
  /** The first message shown. */
  greeting?: string;
  /** Any CSS colour; text on it is black or white, whichever is readable. */
  color?: string;
  /** Of the launcher. Default: right. */
  position?: 'right' | 'left';
  /** `auto`: the visitor's system's. */
  theme?: 'auto' | 'light' | 'dark';
  /** One of the folder `texts`. Default: the page's, and English where that is not there. */
  lang?: string;
  /** Default: that of `lang`, else the page's. */
  dir?: 'ltr' | 'rtl';
  /** Words in another language, all or some. */
  texts?: Partial<Texts>;
  /** Open at once. */
  open?: boolean;
  /** Show the chat in this element, without a launcher. */
  target?: HTMLElement;
  /** The gateway's address, if it is not where this module came from. */
  base?: string;
  /** Proves who the visitor is, where the site has users of its own. */
  userToken?: UserToken;
}

/** What the site's server signed for a user who is logged in, or a function that fetches it: called before each call. */
export type UserToken = string | (() => string | null | Promise<string | null>) | null;

export interface Chat {
  element: HTMLElement;
  open(): Promise<void>;
  close(): void;
  remove(): void;
  /** After a login, or with null after a logout. */
  setUserToken(userToken: UserToken): void;
}

/** Puts the chat on the page; a chat of this agent at this place that is there already is returned as it is. */
export function mount(options: MountOptions): Chat;

export interface SessionMetadata {
  website_domain: string;
  user_agent: string;
  timestamp: string;
}

/** The visitor's session id, in localStorage; in memory where storage is blocked or there is no window. */
export class SessionManager {
  /** One per agent, because the gateway binds a session to its agent. */
  static getInstance(agentId?: string): SessionManager;
  constructor(key: string);
  /** The id, made up on first use. It is the secret of the session. */
  getSessionId(): string;
  /** The id if there is one; makes none. */
  findSessionId(): string | null;
  /** Stores a session that the gateway minted (`POST /api/sessions`). */
  setSession(sessionId: string, token: string): void;
  /** Forgets the session: the next message begins a new one. */
  clearSession(): void;
  getSessionMetadata(): SessionMetadata;
}

export interface Answer {
  response: string;
  metadata: Record<string, any>;
}

export interface Message {
  id: string;
  role: string;
  content: string;
  seq: number;
  turn_id: string;
  created_at: string;
  message_id?: string;
}

/** Messages, oldest first; `next_before` is the `before` of the page that comes before them. */
export interface History {
  messages: Message[];
  next_before: number | null;
}

export type TurnEvent =
  | { type: 'turn.started'; turn_id: string; session_id: string; message?: string; message_id?: string }
  | { type: 'text.delta'; text: string }
  | { type: 'custom'; [name: string]: any }
  | { type: 'turn.completed'; response: string; metadata: Record<string, any> }
  | { type: 'turn.failed'; code: string; title: string; retryable: boolean }
  | { type: 'turn.cancelled' }
  /** Forget the text so far: it is sent again. */
  | { type: 'log.reset' }
  /** The session was over; the message opened a new one. */
  | { type: 'session.replaced' }
  /** A feed is open, from now on: read the transcript. */
  | { type: 'feed.opened' }
  | { type: 'connection.lost'; wait_s: number }
  | { type: 'connection.restored' };

/** A problem that the gateway answered with; `code` is `unreachable` where there was no answer. */
export class AgentError extends Error {
  constructor(problem: { code: string; title: string; status?: number; retryAfter?: number | null; retryable?: boolean });
  code: string;
  title: string;
  status: number;
  /** In seconds. */
  retryAfter: number | null;
  retryable: boolean;
}

export interface SendOptions {
  /** The same for each attempt at one message: it is then answered once. */
  messageId?: string;
  signal?: AbortSignal;
}

/** The gateway's HTTP calls. Problems that pass by themselves are retried with backoff; any other failure is an AgentError. */
export class AgentService {
  constructor(options?: { base?: string; session?: SessionManager; userToken?: UserToken });
  /** Who the visitor is from now on; null: nobody that the site knows. */
  setUserToken(userToken: UserToken): void;
  sendMessage(agentId: string, message: string, options?: SendOptions): Promise<Answer>;
  /** Ends with `turn.completed`, `turn.failed` or `turn.cancelled`; resumes by itself. */
  streamMessage(agentId: string, message: string, options?: SendOptions): AsyncGenerator<TurnEvent, void, void>;
  /** The session's turns as they happen, whoever started them, until the signal or the session's end. */
  watch(options?: { signal?: AbortSignal }): AsyncGenerator<TurnEvent, void, void>;
  /** Stops the answer that is being made; false when there was none. */
  cancel(agentId: string): Promise<boolean>;
  history(options?: { before?: number | null; limit?: number }): Promise<History>;
  /** Ends the session, at the gateway and here. */
  endSession(): Promise<void>;
}
