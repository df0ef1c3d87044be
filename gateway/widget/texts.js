/** What the chat says, in English. A site gives its own words, all or some, as `texts` or `data-texts`. */

export const TEXTS = {
  open: 'Open the chat',
  close: 'Close the chat',
  conversation: 'Conversation',
  placeholder: 'Write a message…',
  message: 'Message',
  send: 'Send',
  stop: 'Stop the answer',
  you: 'You:',
  agent: 'Answer:',
  sending: 'Sending…',
  stopped: 'Stopped',
  again: 'New conversation',
  againQuestion: 'End this conversation and begin a new one?',
  againYes: 'Begin anew',
  againNo: 'Go on here',
  ended: 'The earlier conversation has ended. This is a new one.',
  earlier: 'Show earlier messages',
  notLoaded: 'The conversation could not be loaded.',
  retry: 'Try again',
  latest: 'Newest messages',
  offline: 'You are offline. Messages are sent when you are back.',
  reconnecting: 'Reconnecting…',
  wait: 'A moment please, next try in {seconds} s.',
  failed: 'This message could not be answered.',
  unreachable: 'No connection. This message was not sent.',
  rate_limited: 'That were too many messages at once.',
  turn_timeout: 'The answer took too long.',
};

/** @typedef {typeof TEXTS} Texts */
