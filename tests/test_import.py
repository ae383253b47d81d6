import os
import subprocess
import sys

HEAVY = (
    "transformers",
    "datasets",
    "lm_eval",
    "gymnasium",
    "matplotlib",
    "jinja2",
    "tqdm",
    "pandas",
    "scipy",
    "triton",
)


def run(code: str) -> str:
    """Standard output of a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_heavy_module_beside_torch():
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import hqlt\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules and name not in before])"
    )
    assert run(code).strip() == "[]"


def test_ops_are_functions_after_import():
    code = (
        "import hqlt, types\n"
        "names = ('delta_rule', 'gated_delta_rule', 'linear_attention', 'window_attention')\n"
        "assert all(isinstance(getattr(hqlt.ops, name), types.FunctionType) for name in names)\n"
        "assert all(getattr(hqlt, name) is getattr(hqlt.ops, name) for name in names)\n"
        "import hqlt.ops.delta.reference, hqlt.ops.window.chunked\n"
        "assert isinstance(hqlt.ops.delta_rule, types.FunctionType)\n"
        "assert all(hasattr(hqlt, name) for name in hqlt.__all__)\n"
    )
    run(code)


def test_configuration_needs_the_standard_library_only():
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.find_spec('hqlt').submodule_search_locations[0]\n"
        "loader = importlib.util.spec_from_file_location('config', spec + '/config.py')\n"
        "module = importlib.util.module_from_spec(loader); sys.modules['config'] = module\n"
        "loader.loader.exec_module(module)\n"
        "print('torch' in sys.modules, module.MemoryConfig().window)"
    )
    assert run(code).split() == ["False", "16"]
