"""One question to an S3 server before DVC asks thousands: is it there, does it take the key, has it the bucket?

DVC's own answer to a missing bucket or a wrong key is that of a library below it, after seconds of trying. The signature
is AWS's version 4 (docs.aws.amazon.com, "Signature Version 4 signing process").
"""

import datetime
import hashlib
import hmac
import http.client
import re
import socket
import ssl
import urllib.error
import urllib.request
from urllib.parse import quote, urlsplit

from ...errors import HpcmlError, ServiceSilent
from .remote import READ_S, Remote

_EMPTY = hashlib.sha256(b"").hexdigest()
_QUERY = "list-type=2&max-keys=1"
_KEY_FIX = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or hpcml data version remote --login keeps a key"


def look(remote: Remote) -> None:
    """Ask an S3 server of one's own for the remote's bucket; of others, and of what is in doubt, DVC will tell.

    Raises:
        HpcmlError: it refuses the key, or has no such bucket.
        ServiceSilent: nothing listens there, or it gives no answer.
    """
    endpoint = remote.options.get("endpointurl", "")
    if not (remote.is_s3 and endpoint and "secret_access_key" in remote.key):
        return
    bucket = urlsplit(remote.url).netloc
    timeout = int(remote.options.get("read_timeout") or READ_S)
    request = _signed(remote, endpoint.rstrip("/"), bucket)
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return
    except urllib.error.HTTPError as error:
        with error:
            _judged(error.code, error.read(65536).decode(errors="replace"), remote, endpoint, bucket)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # DVC may be told of another authority
        if isinstance(reason, TimeoutError):
            raise ServiceSilent(
                f"the remote gives no answer in {timeout} s",
                origin=endpoint,
                fix="try again later; its log may tell why",
            ) from None
        if isinstance(reason, ConnectionRefusedError | socket.gaierror):
            why = "no such host" if isinstance(reason, socket.gaierror) else "nothing listens there"
            raise ServiceSilent(
                f"the remote refuses the connection: {why}", origin=endpoint,
                fix="start it, or correct the address: hpcml data version remote URL --endpoint …",
            ) from None  # fmt: skip


def _judged(status: int, text: str, remote: Remote, endpoint: str, bucket: str) -> None:
    match = re.search(r"<Code>(\w+)</Code>", text)
    code = match[1] if match else ""
    if status == 404 or code == "NoSuchBucket":
        raise HpcmlError(
            f"the remote has no bucket {bucket!r}", origin=endpoint, fix="make it there, or correct the address: "
            "hpcml data version remote s3://BUCKET/PATH --endpoint …",
        )  # fmt: skip
    if status in (401, 403):
        where = remote.key_from
        raise HpcmlError(f"the remote refuses the key{f' ({code})' if code else ''}", origin=where, fix=_KEY_FIX)


def _signed(remote: Remote, endpoint: str, bucket: str) -> urllib.request.Request:
    """Return a request for the bucket's first name, signed with the remote's key."""
    region = remote.options.get("region", "us-east-1")
    path = f"/{quote(bucket)}"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    day = now[:8]
    headers = {"host": urlsplit(endpoint).netloc, "x-amz-content-sha256": _EMPTY, "x-amz-date": now}
    if token := remote.key.get("session_token"):
        headers["x-amz-security-token"] = token
    names = ";".join(sorted(headers))
    listed = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    canonical = "\n".join(["GET", path, _QUERY, listed, names, _EMPTY])
    scope = f"{day}/{region}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{remote.key['secret_access_key']}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    user = remote.key.get("access_key_id", "")
    headers["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={user}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return urllib.request.Request(f"{endpoint}{path}?{_QUERY}", headers=headers)
