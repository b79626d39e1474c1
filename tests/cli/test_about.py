"""`crosskd-hf env`; the page that `options` prints is compared in tests/test_docs.py."""

from tests.cli.running import Output, run


def test_env(capsys: Output) -> None:
    assert run("env") == 0
    assert {"python", "torch", "crosskd_hf", "cuda"} <= {
        line.split()[0] for line in capsys.readouterr().out.splitlines()
    }
