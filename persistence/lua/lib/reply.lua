-- A reply: a word, the echo that proves whose it is, and what follows the word.
local function reply(word, ...)
  return {word, args.session_id, args.nonce, ...}
end
