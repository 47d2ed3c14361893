"""Where stages run: in this process, on Spark through the driver, or on Spark table by table."""
