"""Alerts from Kafka to Kafka: consume, classify, route, publish, and account for every one of them."""
