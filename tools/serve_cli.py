"""Serve predictions on this machine until Ctrl-C, with Cog's own server and no Docker."""

import argparse
import os
import sys

from tools.server import ServerError, cog_server, end_on_sigterm


def main() -> int:
    """Returns the exit code: 0 after Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="script/serve", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=int(os.environ.get("PORT", "5000")), help="(default: 5000)")
    parser.add_argument(
        "--upload-url", metavar="URL", help="put the pictures below this address, instead of sending them in the answer"
    )
    arguments = parser.parse_args()
    end_on_sigterm(0)
    try:
        address = (arguments.host, arguments.port)
        with cog_server(on_log=_print, address=address, upload_url=arguments.upload_url) as server:
            _print(f"Serving at {server.url}/predictions; Ctrl-C stops.")
            return server.process.wait()
    except ServerError as error:
        _print(f"server error: {error}")
        return 1
    except KeyboardInterrupt:
        return 0


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
