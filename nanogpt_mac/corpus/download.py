"""One checked download. Its failures are either "no network" or "not the file that was expected"."""

import logging
import sys
from functools import partial
from pathlib import Path

from nanogpt_mac.errors import InputError
from nanogpt_mac.files import temporary_folder
from nanogpt_mac.network import NoNetwork, reaching

TIMEOUT_S = (4, 10)  # to connect to one address, and between two pieces of the answer


def download(
    url: str, known: str, algorithm: str = "sha256", key: str = "data.url", instead: str = "data.path=FILE"
) -> bytes:
    """The bytes at `url`, whose checksum by `algorithm` is `known`. Nothing is kept on disk, whatever happens.

    An error names `key`, and `instead` as what gives a local copy.

    Raises NoNetwork where no connection could be made, and InputError where one was made but the answer is
    an HTTP error, is cut short or has another checksum. Proxies are taken from the environment, as
    `requests` does.
    """
    import pooch
    import requests

    expected = f"a whole file with {algorithm} {known}; nothing was kept; try again, or use a local copy with {instead}"
    pooch.get_logger().setLevel(logging.WARNING)
    print(f"downloading {url}", file=sys.stderr)
    fetch = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 16, timeout=TIMEOUT_S)
    with temporary_folder() as folder:
        try:
            retrieve = partial(pooch.retrieve, url, f"{algorithm}:{known}", "download", folder, downloader=fetch)
            file = reaching(url, retrieve)
        except requests.RequestException as error:
            if error.response is not None:
                error.response.close()  # pooch leaves it open
            if _unreachable(error):
                raise NoNetwork(str(_reason(error))) from error
            raise InputError(f"{key}={url}: {_describe(error)}; expected {expected}") from error
        except ValueError as error:  # pooch: the checksum differs
            raise InputError(f"{key}={url}: the file there is cut short or altered; expected {expected}") from error
        return Path(file).read_bytes()


def _reason(error: Exception) -> object:
    """urllib3's own error, from inside that of requests."""
    inner = error.args[0] if error.args else error
    return getattr(inner, "reason", None) or inner


def _unreachable(error: Exception) -> bool:
    from urllib3 import exceptions

    # A NewConnectionError covers a name that cannot be resolved and a refused connection.
    missing = (exceptions.NewConnectionError, exceptions.ConnectTimeoutError, exceptions.ProxyError)
    return isinstance(_reason(error), missing)


def _describe(error: Exception) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.ReadTimeout):
        return f"the server stopped answering for {TIMEOUT_S[1]} s"
    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate is not valid"
    return f"the download failed or broke off ({type(error).__name__})"
