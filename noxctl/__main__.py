from noxctl.cli import main

main()
