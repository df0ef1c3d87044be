"""Session tokens, user tokens and site keys. Nothing here asks a store."""

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from hmac import compare_digest
from time import time
from typing import Any

import jwt
import msgspec

ALGORITHM = "HS256"
MAX_TOKEN = 4096
"""Characters; tokens of this gateway and of sites have some hundred."""
MAX_USER_TOKEN_S = 24 * 3600
CLOCK_LEEWAY_S = 30
"""How far a site's clock may be off."""
MAX_USER_ID = 255


class Expired(ValueError):
    """A token that has expired. `user_id` is the user it was signed for."""

    def __init__(self, user_id: object) -> None:
        super().__init__("it has expired")
        self.user_id = user_id


class SessionToken(msgspec.Struct, frozen=True):
    """What a token says: the session, its agent, its website domain, and its user ('': none yet)."""

    session_id: str
    agent_id: str
    website_domain: str
    user_id: str = ""


class _Claims(msgspec.Struct):
    """The claims of a session token; `exp` is in seconds since 1970."""

    sid: str
    aid: str
    dom: str
    exp: float
    uid: str = ""


_claims_decoder = msgspec.json.Decoder(_Claims)


class SessionTokens:
    """Signs session tokens (JWT, RFC 7519, HS256) with the first key; verifies with all of them. Tokens live for `ttl_s`.

    A token names its key (`kid`), so that only that one is tried; a token of an earlier version names none.
    """

    def __init__(self, keys: Sequence[str], ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._key = keys[0]
        self._header = {"kid": _key_name(self._key)}
        # The HMACs, of nothing yet, by the only headers that session tokens have. A lookup takes the place of parsing: PyJWT
        # takes 41 µs more for a token, a tenth of a turn (2026-11-23).
        macs = [hmac.new(key.encode(), digestmod="sha256") for key in keys]
        self._macs = {_header_of(key, {"kid": _key_name(key)}): [mac] for key, mac in zip(keys, macs, strict=True)}
        self._macs[_header_of(self._key, {})] = macs

    def mint(self, token: SessionToken) -> str:
        """A token, signed, as text."""
        claims: dict[str, Any] = {
            "sid": token.session_id,
            "aid": token.agent_id,
            "dom": token.website_domain,
            "exp": int(time() + self._ttl_s),
        }
        if token.user_id:
            claims["uid"] = token.user_id
        return jwt.encode(claims, self._key, ALGORITHM, self._header)

    def verify(self, text: str) -> SessionToken | None:
        """What a token says; None when it is not good, or not any more. PyJWT agrees: tests/access/test_token_damage.py."""
        if len(text) > MAX_TOKEN or not text.isascii():
            return None
        signed, _, signature = text.rpartition(".")
        header, _, payload = signed.partition(".")
        if not any(_signs(mac, signed, signature) for mac in self._macs.get(header, ())):
            return None
        try:
            claims = _claims_decoder.decode(urlsafe_b64decode(payload + "=="))
        except (ValueError, RecursionError):
            return None
        return SessionToken(claims.sid, claims.aid, claims.dom, claims.uid) if claims.exp > time() else None


def _key_name(key: str) -> str:
    """The name of a key in a token: enough to tell keys apart, and nothing of the key."""
    return sha256(b"session token key\0" + key.encode()).hexdigest()[:8]


def _header_of(key: str, header: dict[str, Any]) -> str:
    """The first part of a token with this header."""
    return jwt.encode({}, key, ALGORITHM, header).partition(".")[0]


def _signs(mac: hmac.HMAC, signed: str, signature: str) -> bool:
    """Whether the signature (base64url without padding) is the key's; compared in constant time."""
    mac = mac.copy()
    mac.update(signed.encode())
    return compare_digest(urlsafe_b64encode(mac.digest()).rstrip(b"="), signature.encode())


def read_user_token(text: str, site_keys: Sequence[str]) -> str:
    """The user of a token that a site has signed for a visitor. Raises ValueError, which says what is wrong with it.

    A JWT, HS256 with one of the agent's site keys, and the claims `sub` (a string) and `exp` (at most 24 hours ahead).
    """
    if not site_keys:
        raise ValueError("this agent has no site key to verify user tokens with")
    claims = _claims(text, site_keys, ("sub", "exp"), leeway_s=CLOCK_LEEWAY_S)
    if int(claims["exp"]) > time() + MAX_USER_TOKEN_S + CLOCK_LEEWAY_S:
        raise ValueError("exp is more than 24 hours ahead")
    user_id = claims["sub"]
    if not isinstance(user_id, str) or not 0 < len(user_id) <= MAX_USER_ID or not user_id.isprintable():
        raise ValueError(f"sub is not a string of 1 to {MAX_USER_ID} printable characters")
    return user_id


def _claims(text: str, keys: Iterable[str], required: Sequence[str], *, leeway_s: float = 0) -> dict[str, Any]:
    """The claims of a token signed with one of the keys, HS256 and no other way. Raises ValueError with the reason.

    Signatures are compared in constant time, by PyJWT.
    """
    if len(text) > MAX_TOKEN or not text.isascii():
        raise ValueError("it is no token")
    reason = "no key has signed it"
    for key in keys:
        try:
            return jwt.decode(text, key, algorithms=[ALGORITHM], options={"require": list(required)}, leeway=leeway_s)
        except jwt.InvalidSignatureError:
            continue
        except jwt.ExpiredSignatureError as error:
            # The signature was verified before the time was looked at.
            raise Expired(jwt.decode(text, options={"verify_signature": False}).get("sub")) from error
        except jwt.MissingRequiredClaimError as error:
            raise ValueError(f"the claim {error.claim} is missing") from error
        except jwt.InvalidAlgorithmError as error:
            raise ValueError(f"it is not signed with {ALGORITHM}") from error
        except (jwt.DecodeError, ValueError, OverflowError, RecursionError):
            # What a header or claims can be: no JSON, nested without end, an infinite number.
            reason = "it is no token"
        except jwt.PyJWTError:
            reason = "its claims are wrong"
    raise ValueError(reason)


def bearer(authorization: str) -> str:
    """The credentials of an Authorization header (RFC 6750); empty when they are of another kind."""
    scheme, _, given = authorization.partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""


def is_one_of(given: str, keys: Iterable[str]) -> bool:
    """Whether something is one of the keys: each is compared, in constant time."""
    found = False
    for key in keys:
        found |= compare_digest(given.encode(errors="surrogatepass"), key.encode())
    return found


def fingerprint(site_key: str) -> str:
    """How a site key is shown: enough to tell which it is, and nothing of it."""
    return f"sha256:{sha256(site_key.encode()).hexdigest()[:12]}"
