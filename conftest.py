pytest_plugins = ["moegate.conformance.plugin"]
