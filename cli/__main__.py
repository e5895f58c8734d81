from moegate.main import run

run()
