/**
 * Sends the visitor's messages, one at a time, and shows their answers.
 *
 * A message is kept in storage with its message_id until it is answered, so each further attempt, of this page, of the next
 * one or of another tab, is one at the same message. The service tries again what passes by itself, as long as Retry-After
 * is short; whatever is left is shown with a button to try again.
 */

import { button } from './dom.js';
import { AgentError } from './service.js';

/** @typedef {import('./transcript.js').Message} Message */
/** @typedef {import('./transcript.js').Answer} Answer */
/** @typedef {ReturnType<typeof createDelivery>} Delivery */
/**
 * @typedef {object} DeliveryOptions
 * @property {string} agent
 * @property {import('./texts/en.js').Texts} t
 * @property {import('./service.js').AgentService} service
 * @property {import('./session.js').SessionManager} session
 * @property {import('./transcript.js').Transcript} transcript
 * @property {(text: string) => void} announce
 * @property {(error: unknown) => boolean} refused  whether an error means that the chat may not be here
 * @property {() => void} began
 * @property {(stopped: boolean) => void} ended  stopped: nobody waits for the answer any more
 * @property {() => void} answered
 * @property {(message: Message) => void} retry  the visitor wants a failed message to be sent again
 */

/** @param {DeliveryOptions} options */
export function createDelivery({ agent, t, service, session, transcript, announce, refused, began, ended, answered, retry }) {
  /** @type {{message: Message, stop: AbortController} | null} the message that this tab waits for */
  let current = null;

  /** @param {Message} message @param {boolean} failed */
  const keep = ({ messageId = '', text }, failed = false) =>
    session.keepPending({ sessionId: session.getSessionId(), messageId, text, failed });

  /** @param {Message} message @param {string} code */
  function showFailure(message, code) {
    const why = /** @type {Record<string, string>} */ (t)[code] ?? t.failed;
    const again = button(t.retry, 'retry');
    again.addEventListener('click', () => retry(message));
    message.fail(why, again);
    announce(`${why} ${t.retry}`);
  }

  /** @param {Message} message @param {Answer} answer @param {string} code */
  function fail(message, answer, code) {
    transcript.stopAnswer(answer);
    keep(message, true);
    showFailure(message, code);
  }

  /** @param {number} seconds  until the next attempt */
  const waiting = (seconds) => navigator.onLine === false ? t.offline
    : seconds > 3 ? t.wait.replace('{seconds}', String(Math.ceil(seconds))) : t.reconnecting;

  /** @param {import('./service.js').TurnEvent} event @param {Message} message @param {Answer} answer */
  function take(event, message, answer) {
    switch (event.type) {
      case 'turn.started':
        message.turnId = answer.message.turnId = event.turn_id;
        message.note('');
        break;
      case 'text.delta':
        answer.add(event.text);
        break;
      case 'log.reset':
        answer.clear();
        break;
      case 'session.replaced':
        transcript.startNext(session.getSessionId(), message, answer.message);
        keep(message);
        break;
      case 'connection.lost':
        (message.turnId ? answer.message : message).note(waiting(event.wait_s));
        break;
      case 'connection.restored':
        answer.message.note('');
        message.note('');
        break;
      case 'turn.completed':
        announce(answer.finish(event.response));
        session.keepPending(null);
        answered();
        break;
      case 'turn.cancelled':
        message.note(transcript.stopAnswer(answer, true) ? '' : t.stopped);
        session.keepPending(null);
        break;
      case 'turn.failed':
        fail(message, answer, event.code);
    }
  }

  /** Send a message of the transcript under its messageId. @param {Message} message */
  async function send(message) {
    const mine = { message, stop: new AbortController() };
    const { signal } = mine.stop;
    current = mine;
    began();
    keep(message);
    transcript.sessionId = session.findSessionId();
    message.note(t.sending);
    const answer = transcript.addAnswer();
    try {
      const events = service.streamMessage(agent, message.text, { messageId: message.messageId, signal });
      for await (const event of events) take(event, message, answer);
    } catch (error) {
      if (signal.aborted) transcript.stopAnswer(answer);
      else if (!refused(error)) fail(message, answer, error instanceof AgentError ? error.code : 'failed');
    } finally {
      if (current === mine) current = null;
      ended(signal.aborted);
    }
  }

  return {
    send,
    get busy() {
      return current !== null;
    },
    /**
     * Go on with the message that waits for its answer, of an earlier page or of another tab.
     * @returns {boolean} whether it is being sent
     */
    resume() {
      const pending = session.findPending();
      if (!pending || current) return false;
      const { messageId, text, failed } = pending;
      const shown = transcript.find(messageId);
      if (shown?.seq !== undefined) {
        // It was answered.
        session.keepPending(null);
        return false;
      }
      if (failed && shown) return false;
      const message = shown ?? transcript.addQuestion(text, { messageId });
      if (failed) showFailure(message, 'failed');
      else void send(message);
      return !failed;
    },
    /**
     * Stop the answer that is being made; where nothing runs, this tab stops asking for it.
     * Rejects as `AgentService.cancel` does.
     */
    async cancel() {
      if ((await service.cancel(agent)) || !current) return;
      current.stop.abort();
      session.keepPending(null);
      current.message.note(t.stopped);
    },
    /** Wait for the answer no longer. */
    stop() {
      current?.stop.abort();
      current = null;
    },
  };
}
