// Compiles only while the widget is what its declarations say.
import * as declared from '../gateway/widget/widget';
import { SessionManager } from '../gateway/widget/session.js';
import { AgentService, AgentError } from '../gateway/widget/service.js';
import { mount } from '../gateway/widget/launcher.js';
import { TEXTS } from '../gateway/widget/texts/en.js';

export const session: declared.SessionManager = SessionManager.getInstance('support');
export const error: declared.AgentError = new AgentError({ code: 'unreachable', title: '' });
export const service = new AgentService({ session: SessionManager.getInstance() }) satisfies {
  [name in Exclude<keyof declared.AgentService, never>]: declared.AgentService[name];
};
export const texts: declared.Texts = TEXTS;
export const everyText: typeof TEXTS = {} as declared.Texts;
export const put: typeof declared.mount = mount;
