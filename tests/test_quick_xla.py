"""The flags for quick compilation, and what there is instead where XLA does not know them."""

import quick_xla


def test_flags_are_none_where_one_of_them_is_unknown(monkeypatch, capsys):
    assert quick_xla.quick_flags() == quick_xla.QUICK
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(quick_xla, "QUICK", "--xla_no_such_flag=1")
    assert quick_xla.quick_flags() == ""
    assert "xla_no_such_flag" in capsys.readouterr().err


def test_number_of_devices_changes_and_no_other_flag(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{quick_xla.DEVICES}=8 --xla_backend_optimization_level=0")
    assert quick_xla.devices_flag(3) == f"--xla_backend_optimization_level=0 --{quick_xla.DEVICES}=3"
