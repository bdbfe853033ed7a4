"""The settings of the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated

from radixkv.config.limits import MAX_COUNT
from radixkv.config.setting import Setting, check_settings, described
from radixkv.errors import ConfigError

MAX_PORT = 65535


@described
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of `radixkv serve`, checked when they are made."""

    host: Annotated[str, Setting("Address to listen on; 127.0.0.1 is reached from this machine alone.")] = "127.0.0.1"
    port: Annotated[int, Setting("Port to listen on; 0 takes a free one.", minimum=0, maximum=MAX_PORT)] = 8000
    served_model_name: Annotated[
        str | None, Setting("Name of the model in requests and answers.", unset="as the model was given")
    ] = None
    api_key: Annotated[
        str | None,
        Setting("A key that every client must send. It shows in the list of processes; `api_keys` does not.", unset=""),
    ] = None
    api_keys: Annotated[
        str | None, Setting("TOML file with the hashed keys of tenants, each with a cache of its own.", unset="")
    ] = None
    max_waiting: Annotated[
        int,
        Setting(
            "Requests that may wait for pages; one more is refused with status 429.",
            unit="requests",
            minimum=1,
            maximum=MAX_COUNT,
        ),
    ] = 1024
    max_body_bytes: Annotated[
        int,
        Setting("Size of a request's body at most; a larger one is refused with status 413.", unit="bytes", minimum=1),
    ] = 16 << 20
    keep_alive_s: Annotated[
        float,
        Setting("A stream that has nothing to say sends a comment after this time.", unit="s", above=0),
    ] = 15.0
    drain_s: Annotated[
        float,
        Setting(
            "After SIGTERM, running requests have this time to finish; new ones get status 503.", unit="s", minimum=0
        ),
    ] = 30.0
    strict: Annotated[
        bool, Setting("Refuse requests with unknown fields, which are otherwise ignored and logged once.")
    ] = False
    keep_answer_ids: Annotated[
        bool,
        Setting("Where the text of an answer comes back in a chat, use the ids that were generated for it."),
    ] = False
    root_path: Annotated[str, Setting("Path under which a proxy serves this server.")] = ""
    ssl_certfile: Annotated[str | None, Setting("Certificate for HTTPS, in PEM.", unset="HTTP")] = None
    ssl_keyfile: Annotated[str | None, Setting("Private key of the certificate, in PEM.", unset="")] = None
    ssl_keyfile_password: Annotated[str | None, Setting("Password of the private key.", unset="")] = None
    ssl_ca_certs: Annotated[
        str | None, Setting("Certificates in PEM; clients must show one that these signed.", unset="")
    ] = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.api_key is not None and self.api_keys is not None:
            raise ConfigError("api_key is for one client and api_keys for several; give one of them")
        if self.api_key == "":
            raise ConfigError("api_key must be a text that is not empty; leave it out to serve without keys")
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_keyfile_password or self.ssl_ca_certs):
            raise ConfigError("ssl_keyfile, ssl_keyfile_password and ssl_ca_certs need an ssl_certfile; set it, too")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server.

        >>> ServerConfig().is_local, ServerConfig(host="localhost").is_local, ServerConfig(host="0.0.0.0").is_local
        (True, True, False)
        """
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:  # a name
            return False

    @property
    def has_keys(self) -> bool:
        """Whether clients need a key."""
        return self.api_key is not None or self.api_keys is not None
