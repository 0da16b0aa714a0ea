"""The configuration's section `fleet`: several variants behind one endpoint."""

from __future__ import annotations

from pydantic import Field

from quantline.config.section import Section


class EndpointConfig(Section):
    """Where the fleet answers."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    certificate: str | None = None
    private_key: str | None = None
    body_mib: float = Field(default=8, gt=0, le=1024)


class FleetLimits(Section):
    """When a request goes to the next variant."""

    queued_requests: int | None = Field(default=64, ge=1)
    queued_tokens: int | None = Field(default=None, ge=1)
    hang_seconds: float = Field(default=300, gt=0)


class HealthConfig(Section):
    """When a variant counts as degraded or unhealthy."""

    interval_seconds: float = Field(default=1.0, gt=0)
    kv_cache_high: float = Field(default=0.9, gt=0, le=1)
    kv_cache_low: float = Field(default=0.7, gt=0, le=1)
    memory_high: float = Field(default=0.95, gt=0, le=1)
    memory_low: float = Field(default=0.9, gt=0, le=1)
    looks: int = Field(default=3, ge=1)
    stuck_seconds: float = Field(default=30, gt=0)


class RestartConfig(Section):
    """Pauses before a variant that ended is started again."""

    first_seconds: float = Field(default=1.0, gt=0)
    most_seconds: float = Field(default=60.0, gt=0)


class ShareConfig(Section):
    """A share of a precision's requests for another variant."""

    precision: str | None = None
    variant: str | None = None
    share: float = Field(default=0.0, ge=0, le=1)


class CaptureConfig(Section):
    """Requests and answers that are kept for a verdict."""

    share: float = Field(default=0.0, ge=0, le=1)
    keep_hours: float = Field(default=24.0, gt=0)
    keep_mib: float = Field(default=512.0, gt=0)


class FleetSmokeConfig(Section):
    """The fault drill of `stages.fleet_smoke`. With defaults, since older frozen configurations have none."""

    pipeline: bool = False
    requests: int = Field(default=100, ge=10)
    least_seconds: float = Field(default=5, ge=0)
    concurrency: int = Field(default=4, ge=1)
    max_tokens: int = Field(default=16, ge=1)
    queued_requests: int = Field(default=4, ge=1)
    queue_concurrency: int = Field(default=12, ge=2)
    hang_seconds: float = Field(default=10, gt=0)
    again_seconds: float = Field(default=600, gt=0)

    def faults(self) -> list[str]:
        """What of the options cannot be given together."""
        if self.queue_concurrency > self.queued_requests:
            return []
        return [
            f"fleet_smoke.queue_concurrency={self.queue_concurrency}: would never fill a queue of {self.queued_requests}; "
            "give more than fleet_smoke.queued_requests"
        ]


class FleetConfig(Section):
    """Options of `stages.fleet`; see conf/fleet/default.yaml. With defaults, since older frozen configurations have none."""

    name: str = Field(default="fleet", pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    endpoint: EndpointConfig = EndpointConfig()
    precisions: dict[str, list[str]] = Field(default={})
    gates: bool = True
    limits: FleetLimits = FleetLimits()
    health: HealthConfig = HealthConfig()
    restart: RestartConfig = RestartConfig()
    canary: ShareConfig = ShareConfig()
    shadow: ShareConfig = ShareConfig()
    capture: CaptureConfig = CaptureConfig()
    keys_file: str | None = None
