/**
 * Follows the session while the visitor looks at it: what other tabs and devices send, and what they are answered.
 *
 * One connection per visible tab, and none while this tab waits for an answer of its own. Each time it opens, the newest
 * page of the history is read, so nothing that happened before is missed.
 */

import { button } from './dom.js';

/**
 * @typedef {object} FeedOptions
 * @property {import('./texts/en.js').Texts} t
 * @property {import('./service.js').AgentService} service
 * @property {import('./transcript.js').Transcript} transcript
 * @property {import('./panel.js').Notices} notices
 * @property {() => boolean} resume  sends the message that waits for its answer, if there is one; the feed ends then
 * @property {() => void} changed  an answer begins or ends
 * @property {() => void} ended
 * @property {() => void} reopen  the visitor wants to try again
 */

/** @param {FeedOptions} options */
export function createFeed({ t, service, transcript, notices, resume, changed, ended, reopen }) {
  /** @type {AbortController | null} */
  let stop = null;
  /** @type {import('./transcript.js').Answer | null} what somebody else's message is being answered */
  let answer = null;

  const forget = () => {
    answer = null;
    changed();
  };
  /** The answer ends without a response. @param {boolean} [keep]  show the text so far, as stopped */
  const end = (keep) => {
    if (answer) transcript.stopAnswer(answer, keep);
    forget();
  };

  /** @param {AbortSignal} signal */
  async function refresh(signal) {
    const of = transcript.sessionId;
    try {
      const page = await service.history();
      if (of !== transcript.sessionId || signal.aborted) return;
      transcript.takeNewest(page);
      notices.tellConnection();
    } catch {
      if (signal.aborted) return;
      const retry = button(t.retry, 'pill');
      retry.addEventListener('click', () => (notices.tell(''), reopen()));
      notices.tell(t.notLoaded, retry);
    }
  }

  /** @param {AbortSignal} signal */
  async function follow(signal) {
    for await (const event of service.watch({ signal })) {
      if (signal.aborted) return;
      switch (event.type) {
        case 'feed.opened':
        case 'log.reset':
          await refresh(signal);
          if (resume()) return;
          break;
        case 'turn.started': {
          const { turn_id: turnId, message, message_id: messageId } = event;
          end();
          if (transcript.hasTurn(turnId)) break;
          if (message !== undefined && !transcript.find(messageId)) transcript.addQuestion(message, { messageId, turnId });
          answer = transcript.addAnswer(turnId);
          changed();
          break;
        }
        case 'text.delta':
          answer?.add(event.text);
          break;
        case 'turn.completed':
          if (!answer) break;
          notices.announce(answer.finish(event.response));
          forget();
          // The question may be missing still.
          await refresh(signal);
          break;
        case 'turn.failed':
        case 'turn.cancelled':
          end(event.type === 'turn.cancelled');
          break;
        case 'connection.lost':
          if (navigator.onLine === false) notices.tellConnection();
      }
    }
  }

  return {
    get isOpen() {
      return stop !== null;
    },
    get answering() {
      return answer !== null;
    },
    open() {
      if (stop) return;
      const { signal } = (stop = new AbortController());
      void follow(signal).finally(() => {
        if (!signal.aborted) end();
        ended();
      });
    },
    close() {
      stop?.abort();
      stop = null;
      end();
    },
  };
}
