-- Why the caller may not have this session: a word, or nil when it may. An empty agent_id or website_domain is not
-- compared. A user's session is for that user alone, and for trusted callers: operators, and servers of the site.
-- `foreign` comes first, so that a stranger does not learn whether the session exists.
local function refusal(session)
  if args.agent_id ~= '' and session.agent_id ~= args.agent_id then return 'foreign' end
  if args.website_domain ~= '' and session.website_domain ~= args.website_domain then return 'foreign' end
  local user_id = session.user_id or ''
  if user_id ~= '' and user_id ~= args.user_id and args.trusted ~= '1' then return 'foreign' end
  if session.status == 'erased' then return 'erased' end
  if session.minted == '1' and args.authorized ~= '1' then return 'unauthorized' end
  return nil
end
