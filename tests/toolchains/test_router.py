from __future__ import annotations

import pytest

from quantline.core.errors import UserError
from quantline.toolchains.router import envoy


@pytest.mark.toolchain("router")
def test_the_locked_envoy_says_which_build_it_is_and_another_is_taken_by_its_path(root):
    locked = envoy(root)
    assert locked.version == "1.40.0"
    assert locked.build.endswith("/1.40.0/Clean/RELEASE/BoringSSL")
    assert envoy(root, str(locked.program)) == locked


def test_what_is_no_envoy_or_too_old_is_refused(root, tmp_path):
    with pytest.raises(UserError, match=r"toolchains\.router=/bin/true: does not say that it is Envoy"):
        envoy(root, "/bin/true")
    with pytest.raises(UserError, match="is no program"):
        envoy(root, str(tmp_path))
    old = tmp_path / "envoy"
    old.write_text("#!/bin/sh\necho 'envoy  version: abc/1.30.1/Clean/RELEASE/BoringSSL'\n")
    old.chmod(0o755)
    with pytest.raises(UserError, match=r"is Envoy 1\.30\.1; a fleet needs 1\.40 or newer"):
        envoy(root, str(old))
